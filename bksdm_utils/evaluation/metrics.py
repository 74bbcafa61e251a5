"""FID, KID, Inception score, CLIP score, accuracies: numbers from features (notebook 04)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data.scenes import ATTRIBUTES, Scene
from .networks import MetricClip, Network


class Score(NamedTuple):
    """A number and its error bar: one standard error; of the Inception score the spread over its splits."""

    value: float
    error: float

    def __str__(self) -> str:
        if not 0 < self.error < float("inf"):
            return f"{self.value:.3g}"
        digits = max(0, -math.floor(math.log10(self.error)) + (f"{self.error:e}"[0] == "1"))  # 0.012 but 0.03
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


class Statistics:
    """Mean (D,) and covariance (D, D), divided by N - 1, of features: all that the FID needs."""

    def __init__(self, mean: np.ndarray, covariance: np.ndarray):
        self.mean, self.covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)

    @classmethod
    def of(cls, rows: np.ndarray, chosen: np.ndarray | None = None, block: int = 2048) -> Statistics:
        """Of rows (N, D), or of some of them; only a block of them at a time is held in double precision."""
        chosen = np.arange(len(rows)) if chosen is None else np.sort(chosen)
        if len(chosen) < 2:
            raise ValueError(f"{len(chosen)} images: a covariance needs two at least")
        blocks = [chosen[start : start + block] for start in range(0, len(chosen), block)]
        mean = sum(np.asarray(rows[b], np.float64).sum(0) for b in blocks) / len(chosen)
        centred = (np.asarray(rows[b], np.float64) - mean for b in blocks)
        return cls(mean, sum(x.T @ x for x in centred) / (len(chosen) - 1))

    @classmethod
    def load(cls, path: Path, network: Network, nameless: bool = False) -> Statistics:
        """From an .npz with mu and sigma, as pytorch-fid writes it.

        Args:
            network: whose features they must be.
            nameless: accept a file that does not name its network; published ones do not.

        Raises:
            ValueError: it cannot be read, or is of another network.
        """
        try:
            with np.load(path) as file:
                mean, covariance, key = file["mu"], file["sigma"], str(file["network"]) if "network" in file else None
        except Exception as error:  # zipfile, pickle and numpy each raise their own
            raise ValueError(f"{path} cannot be read ({error}): expected an .npz with mu and sigma") from error
        if mean.shape != (network.dim,) or covariance.shape != (network.dim, network.dim):
            raise ValueError(f"{path} has mu {mean.shape}, sigma {covariance.shape}: expected {network.dim} features; "
                             "the statistics are of another network or layer")  # fmt: skip
        if key != network.key and not (nameless and key is None):
            wrong = "another network" if key else "a network that it does not name"
            raise ValueError(f"{path} is of {wrong}: expected statistics of {network.name}; or name real images")
        return cls(mean, covariance)

    def save(self, path: Path, network: Network) -> None:
        """Writes the .npz that `load` reads, with the name of the network."""
        part = path.with_suffix(".part.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, mu=self.mean, sigma=self.covariance, network=network.key)
        os.replace(part, path)

    @cached_property
    def root(self) -> np.ndarray:
        """The covariance's symmetric square root."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def fid(features, real) -> float:
    """Fréchet distance of Gaussians: |m - m_r|² + Tr(C + C_r - 2 (C C_r)^½) (arXiv 1706.08500).

    Few images bias it upwards: only values of equally many images and one network may be compared. The trace of the
    root is summed over the eigenvalues of C_r^½ C C_r^½, which is symmetric: the number that scipy's sqrtm gives, many
    times faster at 2,048 dimensions, and accurate where there are fewer images than dimensions.

    Args:
        features, real: `Statistics`, or rows (N, D), on any device.
    """
    ours, real = (s if isinstance(s, Statistics) else Statistics.of(torch.as_tensor(s).cpu().numpy())
                  for s in (features, real))  # fmt: skip
    difference = ours.mean - real.mean
    roots = np.sqrt(np.linalg.eigvalsh(real.root @ ours.covariance @ real.root).clip(0)).sum()
    return float(difference @ difference + np.trace(ours.covariance) + np.trace(real.covariance) - 2 * roots)


def kid(features: np.ndarray, real: np.ndarray) -> Score:
    """Kernel distance (arXiv 1801.01401) of rows (N, D), (M, D) by torch-fidelity: unbiased, usable for few images."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(1000, len(features) // 2, len(real) // 2)
    rows = (torch.from_numpy(np.array(x, np.float32)) for x in (features, real))
    result = kid_features_to_metric(*rows, kid_subsets=100, kid_subset_size=size, rng_seed=2020, verbose=False)
    spread = result["kernel_inception_distance_std"] * (size / (len(features) - size)) ** 0.5  # as half_sample_error
    return Score(result["kernel_inception_distance_mean"], spread)


def inception_score(logits: np.ndarray) -> Score:
    """exp E KL(p(y|x) ‖ p(y)) of logits (N, classes) by torch-fidelity: mean and spread over ten splits.

    Fewer than ten images a split bias it downwards.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.from_numpy(np.array(logits, np.float32))
    result = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    return Score(result["inception_score_mean"], result["inception_score_std"])


def mean_score(values: np.ndarray) -> Score:
    """Mean and its standard error; NaN without values."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Score(float(values.mean()) if len(values) else float("nan"), float(error))


def half_sample_error(statistic: Callable[[np.ndarray], float], count: int, repeats: int = 20) -> float:
    """Standard error of a statistic of `count` images: its spread over random halves without replacement.

    A random half varies as the whole does (McCarthy 1969); unlike a bootstrap sample it has no image twice, which would
    shift a FID.

    Args:
        statistic: of indices of images.
    """
    rng = np.random.default_rng(0)
    return float(np.std([statistic(rng.permutation(count)[: count // 2]) for _ in range(repeats)], ddof=1))


def clip_score(clip: MetricClip, images: Sequence[Image.Image], captions: Sequence[str]) -> float:
    """Mean cosine between each image and its caption (the paper's convention: not scaled by 100, not clipped)."""
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions: give one caption for each image")
    return cosines(clip.images(images), clip.texts(captions)).mean().item()


def cosines(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """The cosine of each pair of unit-length embeddings, (N, D) and (N, D) to (N,)."""
    return (images * texts).sum(-1)


def zero_shot_accuracy(clip: MetricClip, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of storybook images whose size, colour, object, place and relation the CLIP model names correctly among
    all alternatives, each over the images that `showing` gives.
    """
    embeddings, accuracies = clip.images(images), {}
    for name in (*ATTRIBUTES, "relation"):
        if chosen := showing(scenes, name):
            correct = correct_attribute(clip, embeddings[chosen], [scenes[i] for i in chosen], name)
            accuracies[name] = float(correct.mean())
    return accuracies


def pixel_distance(image: Image.Image, other: Image.Image) -> float:
    """Root mean square over pixels and channels, in grey levels of 255."""
    one, other = (np.asarray(part.convert("RGB"), np.float32) for part in (image, other))
    return float(np.sqrt(np.square(one - other).mean()))


def showing(scenes: Sequence[Scene], attribute: str) -> list[int]:
    """The scenes that show an attribute unambiguously: one object, or for the relation two."""
    return [i for i, scene in enumerate(scenes) if len(scene.things) == (2 if attribute == "relation" else 1)]


def correct_attribute(clip: MetricClip, images: torch.Tensor, scenes: Sequence[Scene], attribute: str) -> np.ndarray:
    """For which embedded images, (N, D), the CLIP model finds the scene's own attribute the likeliest, (N,) of bool."""
    options = [scene.alternatives(attribute) for scene in scenes]
    texts = clip.texts([option.caption for group in options for option in group])
    similarity = torch.einsum("nd,nod->no", images, texts.view(len(scenes), len(options[0]), -1))
    truth = torch.tensor([group.index(scene) for scene, group in zip(scenes, options, strict=True)])
    return (similarity.argmax(1).cpu() == truth).numpy()
