"""The metric networks: CLIP, the Inceptions, DINO (notebooks 03 to 06). None is downloaded without a command."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ..data.downloads import DOWNLOADS
from ..data.scenes import COLOURS, OBJECTS, PLACES, SIZES, Thing
from ..files import ROOT, NotAvailable
from ..models.devices import memory_advice
from ..models.hashes import tensors_hash
from ..models.loading import check_tokenizer, load

try:  # published CLIP scores are of Pillow's resizing; transformers 5 resizes with torchvision by default
    from transformers import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

FAST = torch.channels_last  # twice as fast for Inception on a CPU


@dataclass(frozen=True)
class Network:
    """A network that maps images, or texts, to feature rows.

    Attributes:
        name: fit for a file name.
        key: a hash of its weights and of how it prepares its input.
        dim: length of a row.
        prepare: one image or text to a tensor; called in threads.
        forward: a batch of such tensors, (N, …), to (N, dim).
    """

    name: str
    key: str
    dim: int
    prepare: Callable[[object], torch.Tensor]
    forward: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, items: Sequence[object]) -> torch.Tensor:
        """Rows of images or texts, (N, dim)."""
        batches = [items[start : start + 128] for start in range(0, len(items), 128)]
        return torch.cat([self.rows([self.prepare(item) for item in batch]) for batch in batches])

    @torch.no_grad()
    def rows(self, prepared: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of one batch of what `prepare` gave, (N, dim).

        Raises:
            RuntimeError: a GPU's memory did not suffice.
        """
        with memory_advice(f"scoring {len(prepared)} images or texts at once by {self.name}", "device='cpu'",
                           "a smaller CLIP model (clip)", "nothing else on this GPU"):  # fmt: skip
            return self.forward(torch.stack(list(prepared)))


def clean_text(text: str) -> str:
    """A caption as open_clip reads it: wrongly decoded letters mended, HTML's entities resolved, single spaces."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class MetricClip:
    """A CLIP model that compares images with texts.

    Args:
        path: a transformers CLIPModel folder, or the hub id of one that has been downloaded.

    Raises as `models.loading.load`.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        self.model = load(CLIPModel, path, local_files_only=True).float().to(device).eval()
        self.tokenizer = load(CLIPTokenizer, path, local_files_only=True)
        self.processor = load(CLIPImageProcessorPil, path, local_files_only=True)
        check_tokenizer(self.tokenizer, self.model.config.text_config.vocab_size, path)
        side, expected = dict(self.processor.crop_size).get("height"), self.model.config.vision_config.image_size
        if self.processor.do_center_crop and side != expected:
            raise ValueError(f"the image processor of {str(path)!r} makes images of {side} pixels, its network takes "
                             f"{expected}: expected the processor that belongs to it")  # fmt: skip

    @cached_property
    def key(self) -> str:
        """A hash of weights, vocabulary and image preparation."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return tensors_hash(self.model.state_dict(), f"{self.processor.to_json_string()}{vocabulary}")

    @cached_property
    def image_network(self) -> Network:
        """The vision tower before its projection; the storybook's FID is of these features."""

        def prepare(image: Image.Image) -> torch.Tensor:
            return self.processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            return self.model.vision_model(pixels.to(self.model.device)).pooler_output

        return Network("clip", self.key, self.model.config.vision_config.hidden_size, prepare, forward)

    @cached_property
    def text_network(self) -> Network:
        """Unit-length embeddings of texts."""

        def prepare(text: str) -> torch.Tensor:
            return self.tokenizer(
                clean_text(text), padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids[0]

        def forward(ids: torch.Tensor) -> torch.Tensor:
            text = self.model.text_model(ids.to(self.model.device)).pooler_output
            return F.normalize(self.model.text_projection(text), dim=-1)

        return Network("clip_text", self.key, self.model.config.projection_dim, prepare, forward)

    @torch.no_grad()
    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Rows of `image_network` to unit-length embeddings, (N, D), which can be compared with those of texts."""
        return F.normalize(self.model.visual_projection(features.to(self.model.device)), dim=-1)

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit-length embeddings of images, (N, D)."""
        return self.embed(self.image_network(images))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit-length embeddings of texts, (N, D)."""
        return self.text_network(texts)

    @cached_property
    def storybook_classes(self) -> torch.Tensor:
        """A classifier of storybook's objects and colours, (80, D): for each the mean embedding of its captions."""
        classes = [(o, c) for o in OBJECTS for c in COLOURS]
        things = [str(Thing(size, c, o)) for o, c in classes for size in SIZES]
        embeddings = self.texts([f"{thing} {place}" for thing in things for place in PLACES])
        return F.normalize(embeddings.view(len(classes), -1, self.model.config.projection_dim).mean(1), dim=-1)

    @torch.no_grad()
    def storybook_logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embedded images, (N, D), to logits over `storybook_classes`, (N, 80), for the Inception score."""
        return self.model.logit_scale.exp() * embeddings @ self.storybook_classes.T


def inception_pytorch(device: str = "cpu") -> Network:
    """pytorch-fid's Inception, 2,048 features, bilinear resizing: the paper's FID (clean-fid's legacy_pytorch).

    Raises as `find_weights`.
    """
    from cleanfid.inception_pytorch import InceptionV3

    weights = find_weights("inception_pytorch_fid")
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(weights.parent.parent))  # where the network's own code looks for them
    try:
        model = InceptionV3(output_blocks=[3], resize_input=False)
    finally:
        torch.hub.set_dir(before)
    return _inception("inception_pytorch", model, "legacy_pytorch", device,
                      lambda pixels: model(pixels.to(device) / 255)[0].flatten(1))  # fmt: skip


def inception_clean(device: str = "cpu") -> Network:
    """clean-fid's Inception, 2,048 features, antialiased bicubic (arXiv 2104.11222); raises as `find_weights`."""
    from cleanfid.inception_torchscript import InceptionV3W

    model = InceptionV3W(str(find_weights("inception_clean_fid").parent), download=False)
    return _inception("inception_clean", model, "clean", device, lambda pixels: model(pixels.to(device)))


def _inception(name: str, model: torch.nn.Module, resizing: str, device: str, forward: Callable) -> Network:
    """One of clean-fid's; its input is (3, 299, 299) floats of 0 … 255."""
    from cleanfid.resize import build_resizer

    model.to(device, memory_format=FAST).eval()
    resize = build_resizer(resizing)
    return Network(name, tensors_hash(model.state_dict(), resizing), 2048,
                   lambda image: torch.from_numpy(resize(np.array(image.convert("RGB")))).permute(2, 0, 1),
                   forward)  # fmt: skip


def inception_classes(device: str = "cpu") -> Network:
    """torch-fidelity's Inception, 1,008 unbiased logits: the paper's Inception score; raises as `find_weights`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = find_weights("inception_torch_fidelity")
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"], str(weights))
    model.to(device, memory_format=FAST)
    return Network("inception_classes", tensors_hash(model.state_dict(), "logits_unbiased"), 1008,
                   lambda image: torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1),
                   lambda pixels: model(pixels.to(device))[0])  # fmt: skip


def dino(device: str = "cpu", path: str = "facebook/dino-vits16") -> Network:
    """DINO's ViT-S/16 (arXiv 2104.14294): the class token, 384 features; how alike two images of one subject are.

    Raises as `models.loading.load`.
    """
    from torchvision import transforms
    from transformers import ViTModel

    model = load(ViTModel, path, add_pooling_layer=False, local_files_only=True)
    model.float().to(device).eval()  # a checkpoint in half precision would be loaded as such
    prepare = transforms.Compose([
        lambda image: image.convert("RGB"), transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    return Network("dino", tensors_hash(model.state_dict(), "256-224"), model.config.hidden_size, prepare,
                   lambda pixels: model(pixels.to(device)).last_hidden_state[:, 0])  # fmt: skip


def find_weights(name: str) -> Path:
    """The file of a network's weights, one of `DOWNLOADS`; raises NotAvailable where it is missing."""
    path = ROOT / DOWNLOADS[name].path
    hub = Path(torch.hub.get_dir()) / "checkpoints" / path.name
    if not (path.is_file() or hub.is_file()):
        raise NotAvailable(f"{path.name} is missing: looked in {path.parent} and {hub.parent}. With a network: "
                           f"python -m bksdm_utils download {name}")  # fmt: skip
    return path if path.is_file() else hub
