"""The metric networks: CLIP, the Inceptions, DINO. Nothing is downloaded in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ..data.downloads import DOWNLOADS
from ..data.scenes import COLOURS, OBJECTS, PLACES, SIZES, Thing
from ..files import ROOT, NotAvailable, is_hub_id, resolve
from ..models.hashes import tensors_hash

FAST = torch.channels_last  # twice as fast for Inception on a CPU


@dataclass(frozen=True)
class Network:
    """A network that describes pictures, or texts, by rows of numbers.

    Attributes:
        name: fit for a file name.
        key: a hash of its weights and of how it prepares its input.
        dim: numbers in a row.
        prepare: one picture or text to a tensor; called in threads.
        forward: a batch of such tensors, (N, …), to (N, dim).
    """

    name: str
    key: str
    dim: int
    prepare: Callable[[object], torch.Tensor]
    forward: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def __call__(self, items: Sequence[object], batch_size: int = 128) -> torch.Tensor:
        """Rows of pictures or texts, (N, dim)."""
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        return torch.cat([self.forward(torch.stack([self.prepare(item) for item in batch])) for batch in batches])


class MetricClip:
    """A CLIP that compares pictures with texts.

    Args:
        place: a transformers CLIPModel folder, or the hub id of one that has been fetched.

    Raises:
        Missing: a hub id that has not been fetched; it says where it was looked for and how to get it.
        ValueError: there is no such folder, or it is no CLIP.
    """

    def __init__(self, place: str | Path, device: str | torch.device = "cpu"):
        place = resolve(place)
        try:
            self.model = CLIPModel.from_pretrained(place, local_files_only=True).float().to(device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
            self.processor = CLIPImageProcessor.from_pretrained(place, local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise _not_available(place)(f"no CLIP at {place!r}: looked for a folder, and in the hub's cache on this machine "
                                   f"({reason}). With a network: hf download {place}") from error  # fmt: skip

    @cached_property
    def key(self) -> str:
        """A hash of weights, vocabulary and picture preparation."""
        about = f"{self.processor.to_json_string()}{sorted(self.tokenizer.get_vocab().items())}"
        return tensors_hash(self.model.state_dict(), about)

    @cached_property
    def pictures(self) -> Network:
        """What the vision tower makes of a picture before its projection; the storybook's FID is of these features."""

        def prepare(picture: Image.Image) -> torch.Tensor:
            return self.processor(picture.convert("RGB"), return_tensors="pt").pixel_values[0]

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            return self.model.vision_model(pixels.to(self.model.device)).pooler_output

        return Network("clip", self.key, self.model.config.vision_config.hidden_size, prepare, forward)

    @cached_property
    def captions(self) -> Network:
        """Unit-length embeddings of texts."""

        def prepare(text: str) -> torch.Tensor:
            ids = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            return ids[0]

        def forward(ids: torch.Tensor) -> torch.Tensor:
            text = self.model.text_model(ids.to(self.model.device)).pooler_output
            return F.normalize(self.model.text_projection(text), dim=-1)

        return Network("clip_text", self.key, self.model.config.projection_dim, prepare, forward)

    @torch.no_grad()
    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Rows of `pictures` to unit-length embeddings, (N, D), that are comparable with those of texts."""
        return F.normalize(self.model.visual_projection(features.to(self.model.device)), dim=-1)

    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit-length embeddings of pictures, (N, D)."""
        return self.embed(self.pictures(pictures))

    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Unit-length embeddings of texts, (N, D)."""
        return self.captions(captions)

    @cached_property
    def storybook_classes(self) -> torch.Tensor:
        """A classifier of storybook's objects and colours, (80, D): for each the mean embedding of its captions."""
        classes = [(o, c) for o in OBJECTS for c in COLOURS]
        captions = [str(Thing(size, c, o)) for o, c in classes for size in SIZES]
        captions = [f"{thing} {place}" for thing in captions for place in PLACES]
        return F.normalize(
            self.texts(captions).view(len(classes), -1, self.model.config.projection_dim).mean(1), dim=-1
        )

    @torch.no_grad()
    def storybook_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Rows of `pictures` to logits over `storybook_classes`, (N, 80), for the Inception score."""
        return self.model.logit_scale.exp() * self.embed(features) @ self.storybook_classes.T


def inception_pytorch(device: str = "cpu") -> Network:
    """pytorch-fid's Inception, 2,048 features, bilinear resizing: the paper's FID (clean-fid's legacy_pytorch).

    Raises:
        Missing: its weights are not on this machine.
    """
    from cleanfid.inception_pytorch import InceptionV3
    from cleanfid.resize import build_resizer

    weights = find_weights("inception_pytorch_fid")
    with _hub_dir(weights.parent.parent):  # where the network's own code looks for them
        model = InceptionV3(output_blocks=[3], resize_input=False).to(device, memory_format=FAST).eval()
    resize = build_resizer("legacy_pytorch")
    return Network("inception_pytorch", tensors_hash(model.state_dict(), "legacy_pytorch"), 2048,
                   lambda picture: _resized(picture, resize),
                   lambda pixels: model(pixels.to(device) / 255)[0].flatten(1))  # fmt: skip


def inception_clean(device: str = "cpu") -> Network:
    """clean-fid's Inception, 2,048 features, antialiased bicubic resizing (arXiv 2104.11222).

    Raises:
        Missing: its weights are not on this machine.
    """
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    weights = find_weights("inception_clean_fid")
    model = InceptionV3W(str(weights.parent), download=False).to(device, memory_format=FAST).eval()
    resize = build_resizer("clean")
    return Network("inception_clean", tensors_hash(model.state_dict(), "clean"), 2048,
                   lambda picture: _resized(picture, resize), lambda pixels: model(pixels.to(device)))  # fmt: skip


def inception_classes(device: str = "cpu") -> Network:
    """torch-fidelity's Inception, 1,008 unbiased logits: the paper's Inception score.

    Raises:
        Missing: its weights are not on this machine.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = find_weights("inception_torch_fidelity")
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"], str(weights))
    model.to(device, memory_format=FAST)

    def prepare(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)

    return Network("inception_classes", tensors_hash(model.state_dict(), "logits_unbiased"), 1008, prepare,
                   lambda pixels: model(pixels.to(device))[0])  # fmt: skip


def dino(device: str = "cpu", place: str = "facebook/dino-vits16") -> Network:
    """DINO's ViT-S/16 (arXiv 2104.14294): the class token, 384 features; how alike two pictures of one subject are.

    Raises:
        Missing: it is not on this machine.
        ValueError: `place` is a folder, and no DINO.
    """
    from torchvision import transforms
    from transformers import ViTModel

    try:
        model = ViTModel.from_pretrained(resolve(place), add_pooling_layer=False, local_files_only=True)
    except Exception as error:  # as for CLIP
        raise _not_available(place)(f"no DINO at {place!r}: looked for a folder, and in the hub's cache on this machine. "
                               f"With a network: hf download {place}") from error  # fmt: skip
    model.float().to(device).eval()  # a checkpoint in half precision would be loaded as such
    bicubic = transforms.InterpolationMode.BICUBIC
    prepare = transforms.Compose([
        lambda picture: picture.convert("RGB"), transforms.Resize(256, bicubic), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    return Network("dino", tensors_hash(model.state_dict(), "256-224"), model.config.hidden_size, prepare,
                   lambda pixels: model(pixels.to(device)).last_hidden_state[:, 0])  # fmt: skip


def _not_available(place: str) -> type[ValueError]:
    """`Missing` for a hub id, which may not have been fetched; a path was mistyped, a folder holds something else."""
    return NotAvailable if is_hub_id(place) else ValueError


def find_weights(name: str) -> Path:
    """The file of a network's weights, of `downloads.DOWNLOADS`.

    Raises:
        Missing: it is not there; it says where it was looked for and how to get it.
    """
    path = ROOT / DOWNLOADS[name].path
    hub = Path(torch.hub.get_dir()) / "checkpoints" / path.name
    for place in (path, hub):
        if place.is_file():
            return place
    raise NotAvailable(f"{path.name} is missing: looked in {path.parent} and {hub.parent}. With a network: "
                  f"python -m bksdm_utils download {name}")  # fmt: skip


@contextmanager
def _hub_dir(folder: Path):
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub.set_dir(before)


def _resized(picture: Image.Image, resize: Callable) -> torch.Tensor:
    """A picture to (3, 299, 299) floats of 0 … 255."""
    return torch.from_numpy(resize(np.array(picture.convert("RGB")))).permute(2, 0, 1)
