"""Scores of a folder of images by a named protocol, stored with the hash of these images (notebook 04).

A new score is one function and one line of `SCORES`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.examples import Skipped
from ..data.scenes import ATTRIBUTES, Scene
from ..files import ROOT, folder_lock, in_threads, write_json
from . import metrics
from .features import Openers, compute, real_images
from .folders import check_is_image_folder, complete_images, image_path
from .metrics import Score, Statistics, mean_score
from .networks import MetricClip, Network
from .prompts import Prompt, find_data, storybook_scene
from .protocols import PROTOCOLS

VERSION = 5  # of how features and scores are computed: those of another version are not read
FEW = 10_000  # a FID of fewer images is hardly comparable
FEWEST = 20  # fewer images are not scored
REAL = ("statistics (.npz), a folder or a .zip of real images. COCO's: python -m bksdm_utils download coco_statistics "
        "(or coco_images)")  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder of images.

    Attributes:
        key: a hash of images, captions, networks and real images.
        scores: name -> `Score`.
        clip_scores: id of each image -> its own cosine, lowest first.
        skipped: (id, reason) of images that are missing or damaged.
    """

    protocol: str
    key: str
    num_images: int
    scores: dict[str, Score]
    clip_scores: dict[str, float]
    skipped: Skipped

    @property
    def warning(self) -> str:
        """What must be said beside the FID; empty where there are enough images."""
        biased = f"FID of {self.num_images:,} images is biased upwards: comparable only with values of as many images"
        return "" if self.num_images >= FEW else f"{biased}, never with published ones of 30,000"


class Evaluator:
    """Scores folders of images by one protocol.

    Args:
        protocol: a name of `PROTOCOLS`.
        real: statistics (.npz with mu and sigma), or a folder or .zip of images; None is the protocol's own.
        clip: another CLIP model than the protocol's.
        cache_dir: where the features of real images are kept.

    Raises:
        NotAvailable: weights of its networks, or COCO's real images, are not downloaded.
        ValueError: an unknown protocol, or unusable real images.
    """

    def __init__(
        self, protocol: str, real: str | Path | None = None, device: str = "cpu", cache_dir: str | Path | None = None,
        clip: str | None = None,
    ):  # fmt: skip
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        self.protocol = PROTOCOLS[protocol]
        self.clip = MetricClip(clip or self.protocol.clip, device)
        self.features = self.protocol.features(device) if self.protocol.features else self.clip.image_network
        self.classes = self.protocol.classes(device) if self.protocol.classes else None
        self.cache_dir, path = Path(cache_dir or ROOT / "outputs" / "cache" / "real"), real or self.protocol.real
        self.real_path = path and find_data(path, REAL)
        _ = self.real  # a mistake in it is found before any image is sampled

    @cached_property
    def real(self) -> Statistics:
        """What the generated images are compared with; of real images a file is kept, which `real` takes too."""
        if self.real_features is None:  # the paper's published statistics do not name their network
            return Statistics.load(self.real_path, self.features, nameless=self.protocol.name == "paper")
        statistics, network = Statistics.of(self.real_features), self.features
        of = self.real_path.stem if self.real_path else self.protocol.name
        statistics.save(self.cache_dir / f"{of}-{len(self.real_features)}-{network.name}-{network.key}.npz", network)
        return statistics

    @cached_property
    def real_features(self) -> np.ndarray | None:
        """Features of the real images, (N, D); None where only their statistics are known."""
        if self.real_path is not None and self.real_path.suffix == ".npz":
            return None
        items = real_images(self.real_path)
        with folder_lock(self.cache_dir, wait=True):
            rows, failed = self.compute(self.cache_dir, self.features, items)
        if failed:
            print(f"{len(failed)} real images set aside, such as {failed[0]}")
        return np.stack([rows[key] for key in items if key in rows])

    def compute(self, folder: Path, network: Network, items: Openers) -> tuple[dict[str, np.ndarray], Skipped]:
        """As `features.compute`, of images as the protocol views them."""
        name = f"features-{VERSION}-{network.name}-{self.protocol.name}-{network.key}"
        view = self.protocol.view
        return compute(folder / name, replace(network, prepare=lambda image: network.prepare(view(image))), items)

    def evaluate(self, folder: Path, prompts: Sequence[Prompt]) -> Evaluation:
        """Scores the images of `prompts` in a folder that `sample_folder` filled; what is known is not computed again.

        Raises:
            ValueError: no such folder, too few complete images, or images of other prompts under these ids.
        """
        with self._images(folder, prompts) as images:
            key, path = images.key(), folder / f"scores-{self.protocol.name}.json"
            if (known := _read(path, key)) is not None:
                return replace(known, skipped=images.skipped)  # others may be missing than when it was written
            scores = {name: score for name, function in SCORES.items() if (score := function(images)) is not None}
            order = np.argsort(images.cosines)
            clip_scores = {images.prompts[i].id: round(float(images.cosines[i]), 5) for i in order}
            found = Evaluation(self.protocol.name, key, len(order), scores, clip_scores, images.skipped)
            write_json(path, asdict(found))
            return found

    def fid_by_number(self, folder: Path, prompts: Sequence[Prompt], counts: Sequence[int]) -> dict[int, Score]:
        """Mean of the FID of random subsets of each size, and their spread, which for large subsets is too small."""
        with self._images(folder, prompts) as images:
            rows = images.rows(self.features)
        rng, scores = np.random.default_rng(0), {}
        for count in sorted({min(count, len(rows)) for count in counts}):
            subsets = [rng.permutation(len(rows))[:count] for _ in range(10 if count < len(rows) else 1)]
            values = [metrics.fid(Statistics.of(rows, subset), self.real) for subset in subsets]
            scores[count] = Score(float(np.mean(values)), float(np.std(values)))
        return scores

    @contextmanager
    def _images(self, folder: Path, prompts: Sequence[Prompt]) -> Iterator[ScoredImages]:
        check_is_image_folder(folder)  # before the lock makes one
        with folder_lock(folder, wait=True):
            yield ScoredImages(self, folder, prompts)


def _read(path: Path, key: str) -> Evaluation | None:
    """The stored scores, where they are of exactly these images, networks and real images."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if stored.get("key") != key:
        return None
    scores = {n: Score(*(float("nan") if x is None else x for x in s)) for n, s in stored["scores"].items()}
    return Evaluation(**{**stored, "scores": scores})


class ScoredImages:
    """The complete images of a folder, whose features are computed when a score first needs them.

    In the order of ids: splits and halves are of the same images whatever the order of the prompts.
    """

    def __init__(self, evaluator: Evaluator, folder: Path, prompts: Sequence[Prompt]):
        complete = complete_images(folder, prompts)
        self.prompts = sorted((prompt for prompt in prompts if prompt.id in complete), key=lambda prompt: prompt.id)
        self.hashes = [complete[prompt.id] for prompt in self.prompts]
        self.skipped = [(p.id, "missing or damaged: sample the folder again") for p in prompts if p.id not in complete]
        self.evaluator, self.folder, self.clip = evaluator, folder, evaluator.clip
        self.rows = cache(self._rows)  # features by a network, (N, dim)
        if len(complete) < FEWEST:
            raise ValueError(f"{folder} has {len(complete)} complete images of {len(prompts)}: scores need {FEWEST}")

    def key(self) -> str:
        """A hash of all that the scores depend on."""
        ours = self.evaluator
        networks = [network.key for network in (ours.clip, ours.features, ours.classes) if network]
        images = [(prompt.id, prompt.text, sha256) for prompt, sha256 in zip(self.prompts, self.hashes, strict=True)]
        content = [VERSION, ours.protocol.name, networks, ours.real_features is not None, images]
        digest = hashlib.sha256(json.dumps(content).encode())
        for numbers in (ours.real.mean, ours.real.covariance):
            digest.update(numbers.tobytes())
        return digest.hexdigest()[:16]

    def open(self, i: int) -> Image.Image:
        """Image i."""
        return Image.open(image_path(self.folder, self.prompts[i].id))

    def _rows(self, network: Network) -> np.ndarray:
        items = {sha256: partial(self.open, i) for i, sha256 in enumerate(self.hashes)}
        rows, failed = self.evaluator.compute(self.folder, network, items)
        if failed:
            raise ValueError(f"{self.folder}: images have changed meanwhile: {failed[:3]}")
        return np.stack([rows[key] for key in self.hashes])

    @cached_property
    def embeddings(self) -> torch.Tensor:
        """Of the CLIP model, unit length, (N, D)."""
        return self.clip.embed(torch.from_numpy(self.rows(self.clip.image_network)))

    @cached_property
    def cosines(self) -> np.ndarray:
        """Each image's cosine with its caption, (N,)."""
        network = self.clip.text_network
        items = {prompt.text: partial(str, prompt.text) for prompt in self.prompts}
        rows, _ = compute(self.folder / f"features-{VERSION}-{network.name}-{network.key}", network, items)
        captions = torch.from_numpy(np.stack([rows[prompt.text] for prompt in self.prompts]))
        return metrics.cosines(self.embeddings.cpu(), captions).numpy()

    @cached_property
    def scenes(self) -> list[Scene]:
        """Storybook's scene of each image; empty for other prompts and protocols."""
        scenes = [storybook_scene(prompt) for prompt in self.prompts]
        return scenes if self.evaluator.protocol.name == "storybook" and all(scenes) else []


def _fid(images: ScoredImages) -> Score:
    rows, count = images.rows(images.evaluator.features), len(images.prompts)

    def distance(chosen: np.ndarray) -> float:
        return metrics.fid(Statistics.of(rows, chosen), images.evaluator.real)

    return Score(distance(np.arange(count)), metrics.half_sample_error(distance, count))


def _kid(images: ScoredImages) -> Score | None:
    ours = images.evaluator
    return metrics.kid(images.rows(ours.features), ours.real_features) if ours.real_features is not None else None


def _inception_score(images: ScoredImages) -> Score:
    classes = images.evaluator.classes
    logits = images.rows(classes) if classes else images.clip.storybook_logits(images.embeddings).cpu().numpy()
    return metrics.inception_score(logits)


def _attribute(images: ScoredImages, attribute: str) -> Score | None:
    """Accuracy of an attribute by the CLIP model, over the images that show it."""
    chosen = metrics.showing(images.scenes, attribute)
    if not chosen:
        return None
    scenes = [images.scenes[i] for i in chosen]
    return mean_score(metrics.correct_attribute(images.clip, images.embeddings[chosen], scenes, attribute))


# name -> function of the images; None where it does not apply to them
SCORES: dict[str, Callable[[ScoredImages], Score | None]] = {
    "fid": _fid,
    "kid": _kid,
    "inception_score": _inception_score,
    "clip_score": lambda images: mean_score(images.cosines),
    **{attribute: partial(_attribute, attribute=attribute) for attribute in (*ATTRIBUTES, "relation")},
}


def by_short_name(paths: Sequence[str]) -> dict[str, str]:
    """Each folder or hub id once, by its last two parts, or by as many as distinguish it from the others."""
    different, count = {Path(os.path.abspath(path)).parts: path for path in paths}, 2
    while len(named := {"/".join(parts[-count:]): path for parts, path in different.items()}) < len(different):
        count += 1
    return named


def distance_to(teacher: Path, folder: Path, prompts: Sequence[Prompt]) -> Score:
    """How far a model's images are from the teacher's of the same prompts and noise: `metrics.pixel_distance`, averaged
    over the images that are complete in both folders.

    Raises:
        ValueError: there are none, or an image was sampled from another text than its prompt's.
    """
    both = complete_images(folder, prompts).keys() & complete_images(teacher, prompts).keys()
    if not both:
        raise ValueError(f"{folder} and {teacher} have no image in common: sample the same prompts in both")

    def distance(id: str) -> float:
        return metrics.pixel_distance(*(Image.open(image_path(part, id)) for part in (folder, teacher)))

    return mean_score(list(in_threads(distance, [prompt.id for prompt in prompts if prompt.id in both])))
