"""Scores of a folder of images by a named protocol: resumable, stored with the hash of the images they are of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.examples import Skipped
from ..data.rendering import nearest
from ..data.scenes import Scene
from ..files import ROOT, folder_lock, in_threads, write_json
from .features import FeatureCache, _real_place, compute, real_images
from .folders import check_is_image_folder, check_same_prompts, complete_images, image_path
from .metrics import (
    Score,
    Statistics,
    correct_attributes,
    cosines,
    fid,
    half_sample_error,
    inception_score,
    kid,
    mean_score,
)
from .networks import MetricClip, Network
from .prompts import Prompt, storybook_scene
from .protocols import find_protocol

VERSION = 2  # of how rows and scores are computed: what another version has kept is not read


FEW = 10_000  # pictures below which a FID says little


FEWEST = 20  # pictures that are scored at all


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder of pictures, and all that says of what they are.

    Attributes:
        scores: name -> `Score`.
        clip_scores: id of each picture -> its own cosine, lowest first.
        skipped: (id, reason) of pictures that are missing or damaged.
        key: a hash of pictures, captions, networks and real pictures.
    """

    protocol: str
    key: str
    num_images: int
    scores: dict[str, Score]
    clip_scores: dict[str, float]
    skipped: Skipped

    @property
    def warning(self) -> str:
        """What must be said beside the FID; empty where there are enough pictures."""
        if self.num_images >= FEW:
            return ""
        return (f"FID of {self.num_images:,} pictures is biased upwards: comparable only with values of as many "
                f"pictures, never with published ones of 30,000")  # fmt: skip


class Evaluator:
    """Scores folders of pictures by one protocol.

    Args:
        protocol: a name of `PROTOCOLS`.
        real: statistics (.npz with mu and sigma), or a folder or .zip of pictures; None is the protocol's own.
        clip: another CLIP than the protocol's.
        cache_dir: where the rows of real pictures are kept.

    Raises:
        Missing: weights of its networks, or COCO's real pictures, that were not fetched yet.
        ValueError: an unknown protocol, or unusable real pictures.
    """

    def __init__(
        self,
        protocol: str,
        real: str | Path | None = None,
        device: str = "cpu",
        cache_dir: str | Path | None = None,
        clip: str | None = None,
    ):
        self.protocol = find_protocol(protocol)
        self.judge = MetricClip(clip or self.protocol.clip, device)
        self.features = self.protocol.features(device) if self.protocol.features else self.judge.pictures
        self.classes = self.protocol.classes(device) if self.protocol.classes else None
        self.place, self.cache_dir = real or self.protocol.real, Path(cache_dir or ROOT / "outputs" / "cache" / "real")
        _ = self.real  # a mistake in it is found before any picture is drawn

    @cached_property
    def real(self) -> Statistics:
        """What the drawn pictures are compared with."""
        if self._statistics_only:
            nameless = self.protocol.name == "paper"  # whose published statistics say nothing of their network
            return Statistics.load(_real_place(self.place), self.features, nameless)
        return Statistics.of(self.real_rows)

    @property
    def _statistics_only(self) -> bool:
        return self.place is not None and Path(self.place).suffix == ".npz"

    @cached_property
    def real_rows(self) -> np.ndarray | None:
        """Features of the real pictures, (N, D); None where only their statistics are known."""
        if self._statistics_only:
            return None
        with real_images(self.place) as items, folder_lock(self.cache_dir, wait=True):
            rows = self._rows(self.cache_dir, self.features)
            failed = compute(rows, self._seen(self.features), items)
        if failed:
            print(f"{len(failed)} real pictures set aside, such as {failed[0]}")
        return rows.all()[rows.where([key for key in items if key in rows.place])]

    def evaluate(self, folder: Path, prompts: Sequence[Prompt]) -> Evaluation:
        """Scores the pictures of `prompts` in a folder that `pictures.sample` filled; what is known is not computed
        again.

        Raises:
            ValueError: no such folder, too few whole pictures, or pictures of other prompts under these ids.
        """
        check_is_image_folder(folder)
        with folder_lock(folder, wait=True):
            hashes, skipped = self._whole(folder, prompts)
            key = self._key(hashes, prompts)
            path = folder / f"scores-{self.protocol.name}.json"
            if (known := _read(path, key)) is not None:
                return replace(known, skipped=skipped)  # other pictures may be missing than when it was written
            texts = {prompt.id: prompt.text for prompt in prompts}
            chosen = [Prompt(id, texts[id]) for id in hashes]
            scores, clip_scores = self._scores(folder, chosen, hashes)
            found = Evaluation(self.protocol.name, key, len(chosen), scores, clip_scores, skipped)
            write_json(path, {**asdict(found), "scores": {name: s._asdict() for name, s in scores.items()}})
            return found

    def fid_by_number(self, folder: Path, prompts: Sequence[Prompt], counts: Sequence[int]) -> dict[int, Score]:
        """Mean of the FID of random subsets of each size, and their spread, which for large subsets is too small."""
        check_is_image_folder(folder)
        with folder_lock(folder, wait=True):
            hashes, _ = self._whole(folder, prompts)
            rows = self._computed(folder, self.features, hashes)
        chance, all_, places = np.random.default_rng(0), rows.all(), rows.where(list(hashes.values()))
        found = {}
        for count in sorted({min(count, len(places)) for count in counts}):
            subsets = [chance.permutation(places)[:count] for _ in range(10 if count < len(places) else 1)]
            values = [fid(Statistics.of(all_, subset), self.real) for subset in subsets]
            found[count] = Score(float(np.mean(values)), float(np.std(values)))
        return found

    # --- how ---

    def _whole(self, folder: Path, prompts: Sequence[Prompt]) -> tuple[dict[str, str], Skipped]:
        """id -> hash of each picture that is what the manifest says, and the others.

        In the order of ids: splits and halves are of the same pictures whatever the order of the prompts.
        """
        have = complete_images(folder)
        check_same_prompts(folder, prompts, have)
        hashes = {id: have[id].sha256 for id in sorted(prompt.id for prompt in prompts) if id in have}
        skipped = [(p.id, "missing or damaged: draw the folder again") for p in prompts if p.id not in have]
        if len(hashes) < FEWEST:
            raise ValueError(f"{folder} has {len(hashes)} whole pictures of {len(prompts)}: scores need {FEWEST} at "
                             "least")  # fmt: skip
        return hashes, skipped

    def _key(self, hashes: Mapping[str, str], prompts: Sequence[Prompt]) -> str:
        texts = {prompt.id: prompt.text for prompt in prompts}
        about = [str(VERSION), self.protocol.name, self.judge.key, self.features.key]
        about += [getattr(self.classes, "key", ""), f"KID: {self.real_rows is not None}"]
        about += [f"{id}\x00{texts[id]}\x00{sha256}" for id, sha256 in sorted(hashes.items())]
        digest = hashlib.sha256("\x01".join(about).encode())
        for numbers in (self.real.mean, self.real.covariance):
            digest.update(numbers.tobytes())
        return digest.hexdigest()[:16]

    def _seen(self, network: Network) -> Network:
        """The network, looking at pictures as the protocol has it."""
        prepare = lambda picture: network.prepare(self.protocol.view(picture))  # noqa: E731
        return Network(network.name, network.key, network.dim, prepare, network.forward)

    def _rows(self, folder: Path, network: Network) -> FeatureCache:
        return FeatureCache(folder / f"rows-{VERSION}-{network.name}-{self.protocol.name}-{network.key}", network.dim)

    def _computed(self, folder: Path, network: Network, hashes: Mapping[str, str]) -> FeatureCache:
        rows = self._rows(folder, network)
        items = {sha256: partial(Image.open, image_path(folder, id)) for id, sha256 in hashes.items()}
        failed = compute(rows, self._seen(network), items)
        if failed:
            raise ValueError(f"{folder}: pictures cannot be opened though they are as drawn: {failed[:3]}")
        return rows

    def _scores(
        self, folder: Path, prompts: Sequence[Prompt], hashes: Mapping[str, str]
    ) -> tuple[dict[str, Score], dict[str, float]]:
        sha256 = [hashes[prompt.id] for prompt in prompts]
        features = self._computed(folder, self.features, hashes)
        drawn, places = features.all(), features.where(sha256)
        distance = lambda chosen: fid(Statistics.of(drawn, places[chosen]), self.real)  # noqa: E731
        everything = np.arange(len(places))
        scores = {"fid": Score(distance(everything), half_sample_error(distance, len(places)))}
        if self.real_rows is not None:
            scores["kid"] = kid(drawn[places], self.real_rows)
        seen = features if self.features is self.judge.pictures else self._computed(folder, self.judge.pictures, hashes)
        looked_at, at = seen.all(), seen.where(sha256)
        scores["inception_score"] = inception_score(self._logits(folder, sha256, hashes, looked_at, at))
        cosine = self._cosines(folder, prompts, looked_at, at)
        scores["clip_score"] = mean_score(cosine)
        if self.protocol.name == "storybook" and all(storybook_scene(prompt) for prompt in prompts):
            scores |= self._storybook(folder, prompts, looked_at, at)
        order = np.argsort(cosine)
        return scores, {prompts[i].id: round(float(cosine[i]), 5) for i in order}

    def _logits(self, folder, sha256: Sequence[str], hashes, looked_at: np.ndarray, at: np.ndarray) -> np.ndarray:
        if self.classes is None:
            return self.judge.storybook_logits(torch.from_numpy(looked_at[at])).cpu().numpy()
        classes = self._computed(folder, self.classes, hashes)
        return classes.all()[classes.where(sha256)]

    def _cosines(self, folder: Path, prompts: Sequence[Prompt], looked_at: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Each picture's cosine with its caption, block by block."""
        network = self.judge.captions
        rows = FeatureCache(folder / f"rows-{VERSION}-{network.name}-{network.key}", network.dim)
        keys = [hashlib.sha256(prompt.text.encode()).hexdigest() for prompt in prompts]
        compute(rows, network, {key: (lambda p=p: p.text) for key, p in zip(keys, prompts, strict=True)})
        texts, where, found = rows.all(), rows.where(keys), []
        for start in range(0, len(at), 2048):
            block = slice(start, start + 2048)
            images = self.judge.embed(torch.from_numpy(looked_at[at[block]]))
            found.append(cosines(images.cpu(), torch.from_numpy(texts[where[block]])))
        return torch.cat(found).numpy()

    def _storybook(self, folder: Path, prompts, looked_at: np.ndarray, at: np.ndarray) -> dict[str, Score]:
        """Accuracies: attributes of single objects by the CLIP, relations of two by the nearest render."""
        scenes = [storybook_scene(prompt) for prompt in prompts]
        single = np.array([len(scene.things) == 1 for scene in scenes])
        scores = {}
        if single.any():
            images = self.judge.embed(torch.from_numpy(looked_at[at[single]]))
            right = correct_attributes(self.judge, images, [s for s, one in zip(scenes, single, strict=True) if one])
            scores = {attribute: mean_score(found) for attribute, found in right.items()}
        pairs = [(p, s) for p, s in zip(prompts, scenes, strict=True) if s.relation]
        if pairs:
            found = in_threads(lambda pair: _relation_shown(Image.open(image_path(folder, pair[0].id)), pair[1]), pairs)
            scores["relation"] = mean_score(list(found))
        return scores


def by_short_name(places: Sequence[str]) -> dict[str, str]:
    """Each folder or hub id once, by its last two parts, or by as many as tell it from the others."""
    different, count = {Path(os.path.abspath(place)).parts: place for place in places}, 2
    while len(named := {"/".join(parts[-count:]): place for parts, place in different.items()}) < len(different):
        count += 1
    return named


def distance_to(teacher: Path, folder: Path, prompts: Sequence[Prompt]) -> Score:
    """How far a model's pictures lie from the teacher's of the same prompts and noise: root mean square over pixels,
    in grey levels of 255, averaged over the pictures that both folders have whole.

    Raises:
        ValueError: they have none in common, or a picture was drawn from another text than its prompt's.
    """
    have, theirs = complete_images(folder), complete_images(teacher)
    check_same_prompts(folder, prompts, have)
    check_same_prompts(teacher, prompts, theirs)
    both = [prompt.id for prompt in prompts if prompt.id in have and prompt.id in theirs]
    if not both:
        raise ValueError(f"{folder} and {teacher} have no picture in common: draw the same prompts in both")

    def distance(id: str) -> float:
        one, other = (np.asarray(Image.open(image_path(f, id)).convert("RGB"), np.float32) for f in (folder, teacher))
        return float(np.sqrt(np.square(one - other).mean()))

    return mean_score(list(in_threads(distance, both)))


def _relation_shown(picture: Image.Image, scene: Scene) -> bool:
    options = scene.alternatives("relation")
    return nearest(picture, options) == options.index(scene)


def _read(path: Path, key: str) -> Evaluation | None:
    """The scores of a file, if they are of just these pictures, networks and real pictures."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["key"] != key:
            return None
        none = {"value": float("nan"), "error": float("nan")}
        scores = {
            n: Score(**{k: none[k] if v is None else v for k, v in s.items()}) for n, s in about["scores"].items()
        }
        return Evaluation(**{**about, "scores": scores, "skipped": [tuple(s) for s in about["skipped"]]})
    except (OSError, ValueError, KeyError, TypeError):
        return None
