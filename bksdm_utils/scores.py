"""How good pictures are: FID, KID, Inception score, CLIP score, and the storybook world's exact accuracies.

Only this module knows the networks that judge. Nothing is downloaded in silence: a network whose weights are not there
is an error that names the file, where it was looked for, and the command that fetches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

try:  # transformers 5 resizes by torchvision unless told; CLIP scores are published with Pillow's pixels
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

from . import storybook
from .downloads import DOWNLOADS
from .presets import ROOT, Missing, Preset, is_hub_id, resolve
from .sampling import Pipeline, generate, tensors_hash
from .storybook import Scene

FAST = torch.channels_last  # twice as fast for Inception on a CPU

# --- the networks -----------------------------------------------------------------------------------------------------


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


class ClipJudge:
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
            raise _not_here(place)(f"no CLIP at {place!r}: looked for a folder, and in the hub's cache on this machine "
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
        classes = [(o, c) for o in storybook.OBJECTS for c in storybook.COLOURS]
        captions = [str(storybook.Thing(size, c, o)) for o, c in classes for size in storybook.SIZES]
        captions = [f"{thing} {place}" for thing in captions for place in storybook.PLACES]
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
        raise _not_here(place)(f"no DINO at {place!r}: looked for a folder, and in the hub's cache on this machine. "
                               f"With a network: hf download {place}") from error  # fmt: skip
    model.float().to(device).eval()  # a checkpoint in half precision would be loaded as such
    bicubic = transforms.InterpolationMode.BICUBIC
    prepare = transforms.Compose([
        lambda picture: picture.convert("RGB"), transforms.Resize(256, bicubic), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    return Network("dino", tensors_hash(model.state_dict(), "256-224"), model.config.hidden_size, prepare,
                   lambda pixels: model(pixels.to(device)).last_hidden_state[:, 0])  # fmt: skip


def _not_here(place: str) -> type[ValueError]:
    """`Missing` for a hub id, which may not have been fetched; a path was mistyped, a folder holds something else."""
    return Missing if is_hub_id(place) else ValueError


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
    raise Missing(f"{path.name} is missing: looked in {path.parent} and {hub.parent}. With a network: "
                  f"python -m bksdm_utils.downloads {name}")  # fmt: skip


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


# --- the numbers ------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """A number and its error bar: one standard error, of the Inception score the spread over its splits."""

    value: float
    error: float

    def __str__(self) -> str:
        if not 0 < self.error < float("inf"):
            return f"{self.value:.3g}"
        digits = max(0, -math.floor(math.log10(self.error)) + (f"{self.error:e}"[0] == "1"))  # 0.012 but 0.03
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


class Statistics:
    """Mean and covariance of features, all that the FID needs.

    Args:
        mean: (D,).
        covariance: (D, D), divided by N - 1.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray):
        self.mean, self.covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)

    @classmethod
    def of(cls, rows: np.ndarray, chosen: np.ndarray | None = None, block: int = 2048) -> Statistics:
        """Of rows (N, D), or of some of them, read block by block, so that they may be a file."""
        chosen = np.arange(len(rows)) if chosen is None else np.sort(chosen)
        if len(chosen) < 2:
            raise ValueError(f"{len(chosen)} pictures: a covariance needs two at least")
        blocks = [chosen[start : start + block] for start in range(0, len(chosen), block)]
        mean = sum(np.asarray(rows[b], np.float64).sum(0) for b in blocks) / len(chosen)
        centred = (np.asarray(rows[b], np.float64) - mean for b in blocks)
        return cls(mean, sum(x.T @ x for x in centred) / (len(chosen) - 1))

    @classmethod
    def load(cls, path: Path, network: Network, nameless: bool = False) -> Statistics:
        """From an .npz with mu and sigma, as pytorch-fid writes it.

        Args:
            network: whose features they must be.
            nameless: take a file that does not say whose they are, as published ones do not.

        Raises:
            ValueError: it cannot be read, or is of another network as far as that can be told.
        """
        try:
            with np.load(path) as file:
                mean, covariance, key = file["mu"], file["sigma"], str(file["network"]) if "network" in file else None
        except Exception as error:  # zipfile, pickle and numpy each raise their own
            raise ValueError(f"{path} cannot be read ({error}): expected an .npz with mu and sigma") from error
        dim = network.dim
        if mean.shape != (dim,) or covariance.shape != (dim, dim):
            raise ValueError(f"{path} has mu {mean.shape} and sigma {covariance.shape}, this network gives {dim} "
                             "features: the statistics are of another network or layer")  # fmt: skip
        if key != network.key and not (nameless and key is None):
            raise ValueError(
                f"{path} is of {'another network' if key else 'a network that it does not name'}: expected statistics "
                f"of {network.name}. Name a folder or .zip of pictures instead"
            )
        return cls(mean, covariance)

    def save(self, path: Path, network: Network) -> None:
        """As pytorch-fid writes it, and whose features they are of."""
        np.savez(path, mu=self.mean, sigma=self.covariance, network=network.key)

    @cached_property
    def root(self) -> np.ndarray:
        """The covariance's symmetric square root."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def fid(features, real) -> float:
    """Fréchet distance of Gaussians: |m - m_r|² + Tr(C + C_r - 2 (C C_r)^½) (arXiv 1706.08500).

    Few pictures bias it upwards: only values of equally many pictures and one network may be compared. The trace of
    the root is summed over the eigenvalues of C_r^½ C C_r^½, which is symmetric: the number that scipy's sqrtm gives,
    but many times faster at 2,048 dimensions, and sound where there are fewer pictures than dimensions.

    Args:
        features, real: `Statistics`, or rows (N, D), on any device.
    """
    drawn, real = (s if isinstance(s, Statistics) else Statistics.of(_on_cpu(s)) for s in (features, real))
    difference = drawn.mean - real.mean
    roots = np.sqrt(np.linalg.eigvalsh(real.root @ drawn.covariance @ real.root).clip(0)).sum()
    return float(difference @ difference + np.trace(drawn.covariance) + np.trace(real.covariance) - 2 * roots)


def _on_cpu(rows) -> np.ndarray:
    return rows.cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)


def kid(features: np.ndarray, real: np.ndarray, subsets: int = 100) -> Score:
    """Kernel distance (arXiv 1801.01401) by torch-fidelity: unbiased, so usable for few pictures.

    Args:
        features, real: rows (N, D), (M, D).
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(1000, len(features) // 2, len(real) // 2)
    rows = (torch.from_numpy(np.array(x, np.float32)) for x in (features, real))
    found = kid_features_to_metric(*rows, kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False)
    spread = found["kernel_inception_distance_std"] * (size / (len(features) - size)) ** 0.5  # as half_sample_error
    return Score(found["kernel_inception_distance_mean"], spread)


def inception_score(logits: np.ndarray, splits: int = 10) -> Score:
    """exp E KL(p(y|x) ‖ p(y)) by torch-fidelity: mean and spread over splits.

    Args:
        logits: (N, classes); fewer than ten pictures a split bias it downwards.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(torch.from_numpy(np.array(logits, np.float32)), splits=splits, shuffle=True,
                                   rng_seed=2020)  # fmt: skip
    return Score(found["inception_score_mean"], found["inception_score_std"])


def mean_score(values: np.ndarray) -> Score:
    """Mean and its standard error; NaN without values."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Score(float(values.mean()) if len(values) else float("nan"), float(error))


def half_sample_error(statistic: Callable[[np.ndarray], float], count: int, repeats: int = 20) -> float:
    """Standard error of a statistic of `count` pictures: its spread over random halves, drawn without replacement.

    Half of the sample, left alone by the other half, varies as the whole does (McCarthy 1969); unlike a bootstrap it
    holds no picture twice, which would shift a FID.

    Args:
        statistic: of indices into the pictures.
    """
    chance = np.random.default_rng(0)
    return float(np.std([statistic(chance.permutation(count)[: count // 2]) for _ in range(repeats)], ddof=1))


def clip_score(judge: ClipJudge, pictures: Sequence[Image.Image], captions: Sequence[str]) -> float:
    """Mean cosine between each picture and its caption (the paper's convention: not scaled by 100, not clipped)."""
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions: give one caption for each picture")
    return cosines(judge.images(pictures), judge.texts(captions)).mean().item()


def cosines(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """The cosine of each pair of unit-length embeddings, (N, D) and (N, D) to (N,)."""
    return (images * texts).sum(-1)


def zero_shot_accuracy(judge: ClipJudge, pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of storybook pictures of one object, where nothing is ambiguous, whose size, colour, object and place the
    judge names rightly among all alternatives.
    """
    chosen = [i for i, scene in enumerate(scenes) if len(scene.things) == 1]
    if not chosen:
        raise ValueError("no picture of a single object among the scenes: give more scenes")
    right = named_rightly(judge, judge.images([pictures[i] for i in chosen]), [scenes[i] for i in chosen])
    return {attribute: float(found.mean()) for attribute, found in right.items()}


def named_rightly(judge: ClipJudge, images: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Which of the embedded pictures, (N, D), the judge takes for what their scenes say: attribute -> (N,) of bool."""
    right = {}
    for attribute in storybook.ATTRIBUTES:
        options = [scene.alternatives(attribute) for scene in scenes]
        texts = judge.texts([option.caption for group in options for option in group])
        similarity = torch.einsum("nd,nod->no", images, texts.view(len(scenes), len(options[0]), -1))
        truth = torch.tensor([group.index(scene) for scene, group in zip(scenes, options, strict=True)])
        right[attribute] = (similarity.argmax(1).cpu() == truth).numpy()
    return right


PROMPTS = (
    "a photo of a golden retriever puppy in the snow", "a bowl of ramen on a wooden table",
    "a lighthouse at sunset, oil painting", "a red bicycle leaning against a brick wall",
    "portrait of an old fisherman with a white beard", "a city street at night in the rain",
    "a castle on a hill, watercolor", "a vase of tulips by the window",
)  # fmt: skip


class Scorer:
    """Draws the same captions from the same noise with any pipeline and scores the pictures.

    Storybook pipelines draw held-out scenes, for `proxy` other ones than for `scores`; pipelines of another world draw
    `PROMPTS`, which without a judge are only looked at.

    Args:
        settings: the preset in force; gives judge, number of pictures, steps and guidance.
    """

    def __init__(self, settings: Preset, device: str = "cpu", seed: int = 0):
        self.settings, self.seed, self.scenes = settings, seed, []
        self.captions = list(PROMPTS[: settings.num_images])
        storybook_only = settings.train_data_dir is None  # a judge of that world knows no other pictures
        self.judge = ClipJudge(resolve(settings.judge), device) if settings.judge and storybook_only else None
        if storybook_only:
            self.scenes = [storybook.sample_scene(i, "test") for i in range(settings.num_images)]
            self.captions = [scene.caption for scene in self.scenes]
            numbers = range(settings.num_validation_images)
            self.validation_scenes = [storybook.sample_scene(i, "validation") for i in numbers]

    def draw(self, pipeline: Pipeline) -> list[Image.Image]:
        """One picture for each caption."""
        return self._draw(pipeline, self.captions, self.settings.num_inference_steps)

    def _draw(self, pipeline, captions: Sequence[str], num_inference_steps: int) -> list[Image.Image]:
        return generate(pipeline, captions, seed=self.seed, num_inference_steps=num_inference_steps,
                        guidance_scale=self.settings.guidance_scale)  # fmt: skip

    def scores(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """CLIP score and, for storybook, zero-shot accuracies of single-object pictures; empty without a judge."""
        if self.judge is None:
            return {}
        scores = {"clip_score": clip_score(self.judge, pictures, self.captions)}
        if any(len(scene.things) == 1 for scene in self.scenes):
            scores |= zero_shot_accuracy(self.judge, pictures, self.scenes)
        return {name: round(value, 4) for name, value in scores.items()}

    def proxy(self, pipeline: Pipeline, num_inference_steps: int = 10) -> dict[str, float]:
        """CLIP score, and FID beside real renders of the same scenes, of quickly drawn pictures, to follow a training
        by; NaN without a judge."""
        if self.judge is None:
            return {"clip_score": float("nan"), "fid": float("nan")}
        captions = [scene.caption for scene in self.validation_scenes]
        pictures = self._draw(pipeline, captions, num_inference_steps)
        distance = fid(self.judge.pictures(pictures), self._real_features)
        score = clip_score(self.judge, pictures, captions)
        return {"clip_score": round(score, 4), "fid": round(distance, 3)}

    @cached_property
    def _real_features(self) -> torch.Tensor:
        scenes = self.validation_scenes
        return self.judge.pictures([storybook.render(scene, seed) for seed, scene in enumerate(scenes)])
