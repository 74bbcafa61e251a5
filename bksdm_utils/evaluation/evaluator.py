"""Scores of a folder of images by a named protocol, stored with the hash of these images (notebook 04)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.examples import Skipped
from ..files import ROOT, folder_lock, in_threads, write_json
from .features import FeatureCache, Openers, compute, find_real, real_images
from .folders import check_is_image_folder, check_same_prompts, complete_images, image_path
from .metrics import Score, Statistics, fid, mean_score
from .networks import MetricClip, Network
from .prompts import Prompt, storybook_scene
from .protocols import find_protocol
from .scores import SCORES, ScoredImages

VERSION = 3  # of how features and scores are computed: those of another version are not read
FEW = 10_000  # a FID of fewer images is hardly comparable
FEWEST = 20  # fewer images are not scored


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
        self.protocol = find_protocol(protocol)
        self.clip = MetricClip(clip or self.protocol.clip, device)
        self.features = self.protocol.features(device) if self.protocol.features else self.clip.image_network
        self.classes = self.protocol.classes(device) if self.protocol.classes else None
        path = real or self.protocol.real
        self.real_path, self.cache_dir = path and Path(path), Path(cache_dir or ROOT / "outputs" / "cache" / "real")
        _ = self.real  # a mistake in it is found before any image is sampled

    @cached_property
    def real(self) -> Statistics:
        """What the generated images are compared with."""
        if self.real_features is None:  # the paper's published statistics do not name their network
            return Statistics.load(find_real(self.real_path), self.features, nameless=self.protocol.name == "paper")
        return Statistics.of(self.real_features)

    @cached_property
    def real_features(self) -> np.ndarray | None:
        """Features of the real images, (N, D); None where only their statistics are known."""
        if self.real_path is not None and self.real_path.suffix == ".npz":
            return None
        with real_images(self.real_path) as items, folder_lock(self.cache_dir, wait=True):
            cache, failed = self._compute(self.cache_dir, self.features, items)
        if failed:
            print(f"{len(failed)} real images set aside, such as {failed[0]}")
        return cache.of([key for key in items if key in cache.rows])

    def evaluate(self, folder: Path, prompts: Sequence[Prompt]) -> Evaluation:
        """Scores the images of `prompts` in a folder that `sample_folder` filled; what is known is not computed again.

        Raises:
            ValueError: no such folder, too few complete images, or images of other prompts under these ids.
        """
        check_is_image_folder(folder)
        with folder_lock(folder, wait=True):
            complete, hashes, skipped = self._complete(folder, prompts)
            key, path = self._key(complete, hashes), folder / f"scores-{self.protocol.name}.json"
            if (known := _read(path, key)) is not None:
                return replace(known, skipped=skipped)  # other images may be missing than when it was written
            images = self._images(folder, complete, hashes)
            scores = {name: score for name, function in SCORES.items() if (score := function(images)) is not None}
            order = np.argsort(images.cosines)
            clip_scores = {complete[i].id: round(float(images.cosines[i]), 5) for i in order}
            evaluation = Evaluation(self.protocol.name, key, len(complete), scores, clip_scores, skipped)
            write_json(path, asdict(evaluation))
            return evaluation

    def fid_by_number(self, folder: Path, prompts: Sequence[Prompt], counts: Sequence[int]) -> dict[int, Score]:
        """Mean of the FID of random subsets of each size, and their spread, which for large subsets is too small."""
        check_is_image_folder(folder)
        with folder_lock(folder, wait=True):
            complete, hashes, _ = self._complete(folder, prompts)
            rows = self._features(folder, self.features, complete, hashes)
        rng, scores = np.random.default_rng(0), {}
        for count in sorted({min(count, len(rows)) for count in counts}):
            subsets = [rng.permutation(len(rows))[:count] for _ in range(10 if count < len(rows) else 1)]
            values = [fid(Statistics.of(rows, subset), self.real) for subset in subsets]
            scores[count] = Score(float(np.mean(values)), float(np.std(values)))
        return scores

    def _complete(self, folder: Path, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[str], Skipped]:
        """The prompts of complete images, the hashes of these, and the others.

        In the order of ids: splits and halves are of the same images whatever the order of the prompts.
        """
        images = complete_images(folder)
        check_same_prompts(folder, prompts, images)
        complete = sorted((prompt for prompt in prompts if prompt.id in images), key=lambda prompt: prompt.id)
        skipped = [(p.id, "missing or damaged: sample the folder again") for p in prompts if p.id not in images]
        if len(complete) < FEWEST:
            raise ValueError(f"{folder} has {len(complete)} complete images of {len(prompts)}: scores need {FEWEST}")
        return complete, [images[prompt.id].sha256 for prompt in complete], skipped

    def _key(self, prompts: Sequence[Prompt], hashes: Sequence[str]) -> str:
        networks = [network.key for network in (self.clip, self.features, self.classes) if network]
        images = [(prompt.id, prompt.text, sha256) for prompt, sha256 in zip(prompts, hashes, strict=True)]
        content = [VERSION, self.protocol.name, networks, self.real_features is not None, images]
        digest = hashlib.sha256(json.dumps(content).encode())
        for numbers in (self.real.mean, self.real.covariance):
            digest.update(numbers.tobytes())
        return digest.hexdigest()[:16]

    def _compute(self, folder: Path, network: Network, items: Openers) -> tuple[FeatureCache, Skipped]:
        """The kept features of images as the protocol views them, and what could not be opened."""
        cache = FeatureCache(folder / f"features-{VERSION}-{network.name}-{self.protocol.name}-{network.key}")
        view = self.protocol.view
        return cache, compute(cache, replace(network, prepare=lambda image: network.prepare(view(image))), items)

    def _features(self, folder: Path, network: Network, prompts: Sequence[Prompt], hashes: Sequence[str]) -> np.ndarray:
        items = {sha256: partial(Image.open, image_path(folder, prompt.id))
                 for prompt, sha256 in zip(prompts, hashes, strict=True)}  # fmt: skip
        cache, failed = self._compute(folder, network, items)
        if failed:
            raise ValueError(f"{folder}: images cannot be opened though they have their hash: {failed[:3]}")
        return cache.of(hashes)

    def _images(self, folder: Path, prompts: Sequence[Prompt], hashes: Sequence[str]) -> ScoredImages:
        rows = partial(self._features, folder, prompts=prompts, hashes=hashes)
        clip_features = rows(self.clip.image_network)
        scenes = [storybook_scene(prompt) for prompt in prompts] if self.protocol.name == "storybook" else []
        return ScoredImages(
            clip=self.clip, features=rows(self.features) if self.protocol.features else clip_features,
            clip_features=clip_features, texts=self._texts(folder, prompts),
            logits=rows(self.classes) if self.classes else None, real=self.real, real_features=self.real_features,
            scenes=scenes if all(scenes) else [], open=lambda i: Image.open(image_path(folder, prompts[i].id)),
        )  # fmt: skip

    def _texts(self, folder: Path, prompts: Sequence[Prompt]) -> np.ndarray:
        network = self.clip.text_network
        cache = FeatureCache(folder / f"features-{VERSION}-{network.name}-{network.key}")
        keys = [hashlib.sha256(prompt.text.encode()).hexdigest() for prompt in prompts]
        compute(cache, network, {key: (lambda p=p: p.text) for key, p in zip(keys, prompts, strict=True)})
        return cache.of(keys)


def _read(path: Path, key: str) -> Evaluation | None:
    """The stored scores, where they are of exactly these images, networks and real images."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] != key:
            return None
        scores = {n: Score(*(float("nan") if x is None else x for x in s)) for n, s in stored["scores"].items()}
        return Evaluation(**{**stored, "scores": scores})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def by_short_name(paths: Sequence[str]) -> dict[str, str]:
    """Each folder or hub id once, by its last two parts, or by as many as distinguish it from the others."""
    different, count = {Path(os.path.abspath(path)).parts: path for path in paths}, 2
    while len(named := {"/".join(parts[-count:]): path for parts, path in different.items()}) < len(different):
        count += 1
    return named


def distance_to(teacher: Path, folder: Path, prompts: Sequence[Prompt]) -> Score:
    """How far a model's images are from the teacher's of the same prompts and noise: root mean square over pixels, in
    grey levels of 255, averaged over the images that are complete in both folders.

    Raises:
        ValueError: there are none, or an image was sampled from another text than its prompt's.
    """
    images: list[Mapping] = [complete_images(path) for path in (folder, teacher)]
    for path, complete in zip((folder, teacher), images, strict=True):
        check_same_prompts(path, prompts, complete)
    both = [prompt.id for prompt in prompts if all(prompt.id in complete for complete in images)]
    if not both:
        raise ValueError(f"{folder} and {teacher} have no image in common: sample the same prompts in both")

    def distance(id: str) -> float:
        one, other = (np.asarray(Image.open(image_path(f, id)).convert("RGB"), np.float32) for f in (folder, teacher))
        return float(np.sqrt(np.square(one - other).mean()))

    return mean_score(list(in_threads(distance, both)))
