"""The registry of a folder's scores (notebook 04): a new score is one function and one line of `SCORES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from PIL import Image

from ..data.rendering import nearest
from ..data.scenes import ATTRIBUTES, Scene
from ..files import in_threads
from . import metrics
from .metrics import Score, Statistics, mean_score
from .networks import MetricClip


@dataclass(frozen=True)
class ScoredImages:
    """What the scores are computed from: features of N images of a folder, in the order of their ids.

    Attributes:
        features: of the FID's network, (N, D).
        clip_features: of `clip.image_network`, (N, D).
        texts: embedded captions, (N, D).
        logits: of the Inception score's network, (N, classes); None takes the CLIP model's of storybook's classes.
        real: statistics of the real images.
        real_features: (M, D); None where only their statistics are known.
        scenes: storybook's scene of each image; empty for other prompts and protocols.
        open: opens image i.
    """

    clip: MetricClip
    features: np.ndarray
    clip_features: np.ndarray
    texts: np.ndarray
    logits: np.ndarray | None
    real: Statistics
    real_features: np.ndarray | None
    scenes: Sequence[Scene]
    open: Callable[[int], Image.Image]

    @cached_property
    def cosines(self) -> np.ndarray:
        """Each image's cosine with its caption, (N,)."""
        blocks = [slice(start, start + 2048) for start in range(0, len(self.texts), 2048)]
        images = (self.clip.embed(torch.from_numpy(self.clip_features[block])).cpu() for block in blocks)
        pairs = zip(images, blocks, strict=True)
        return torch.cat([metrics.cosines(rows, torch.from_numpy(self.texts[block])) for rows, block in pairs]).numpy()


def _fid(images: ScoredImages) -> Score:
    distance = lambda chosen: metrics.fid(Statistics.of(images.features, chosen), images.real)  # noqa: E731
    count = len(images.features)
    return Score(distance(np.arange(count)), metrics.half_sample_error(distance, count))


def _kid(images: ScoredImages) -> Score | None:
    return metrics.kid(images.features, images.real_features) if images.real_features is not None else None


def _inception_score(images: ScoredImages) -> Score:
    if images.logits is not None:
        return metrics.inception_score(images.logits)
    return metrics.inception_score(images.clip.storybook_logits(torch.from_numpy(images.clip_features)).cpu().numpy())


def _attribute(images: ScoredImages, attribute: str) -> Score | None:
    """Accuracy of an attribute of single objects by the CLIP model."""
    single = [i for i, scene in enumerate(images.scenes) if len(scene.things) == 1]
    if not single:
        return None
    embeddings = images.clip.embed(torch.from_numpy(images.clip_features[single]))
    return mean_score(metrics.correct_attribute(images.clip, embeddings, [images.scenes[i] for i in single], attribute))


def _relation(images: ScoredImages) -> Score | None:
    """Accuracy of the relation of two objects by the nearest render."""

    def shown(i: int) -> bool:
        options = images.scenes[i].alternatives("relation")
        return nearest(images.open(i), options) == options.index(images.scenes[i])

    pairs = [i for i, scene in enumerate(images.scenes) if scene.relation]
    return mean_score(list(in_threads(shown, pairs))) if pairs else None


# name -> function of the images; None where it does not apply to them
SCORES: dict[str, Callable[[ScoredImages], Score | None]] = {
    "fid": _fid,
    "kid": _kid,
    "inception_score": _inception_score,
    "clip_score": lambda images: mean_score(images.cosines),
    **{attribute: partial(_attribute, attribute=attribute) for attribute in ATTRIBUTES},
    "relation": _relation,
}
