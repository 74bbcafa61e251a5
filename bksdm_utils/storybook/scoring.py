"""How good a storybook teacher is: accuracies by its CLIP, things counted by their colours (notebook 00)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from ..data.rendering import render
from ..data.scenes import COLOURS, OPPOSITE, Scene, Thing
from ..evaluation.metrics import clip_score, correct_attribute, zero_shot_accuracy
from ..evaluation.networks import MetricClip

TOLERANCE = 28  # of 255, between a pixel and a thing's colour


def accuracies(clip: MetricClip, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """CLIP score; what it names correctly in images of one thing, and of two; in how many no thing is drawn twice."""
    scores = {"clip_score": clip_score(clip, images, [scene.caption for scene in scenes])}
    scores |= zero_shot_accuracy(clip, images, scenes) | pair_accuracy(clip, images, scenes)
    return {name: round(value, 4) for name, value in {**scores, "drawn_once": drawn_once(images, scenes)}.items()}


def pair_accuracy(clip: MetricClip, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of images of two things whose objects and colours (means of both) the CLIP names correctly."""
    chosen = [i for i, scene in enumerate(scenes) if scene.relation]
    pairs, embeddings = [scenes[i] for i in chosen], clip.images([images[i] for i in chosen])
    views = [pairs, [replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation]) for scene in pairs]]
    return {f"pair_{name}": float(np.mean([correct_attribute(clip, embeddings, view, name) for view in views]))
            for name in ("object", "colour")}  # fmt: skip


def drawn_once(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> float:
    """Share of countable images of two things in which each of them appears exactly once; NaN if none can be counted.

    A thing is countable if its own colour tells it from the other thing and from the place.
    """
    counts = [[count_thing(image, scene, thing) for thing in scene.things]
              for image, scene in zip(images, scenes, strict=True) if _countable(scene, image.width)]  # fmt: skip
    return float(np.mean([count == [1, 1] for count in counts])) if counts else float("nan")


def count_thing(image: Image.Image, scene: Scene, thing: Thing) -> int:
    """Connected regions of a thing's colour, more than half as large as in a render of the scene."""
    expected = max(_regions(render(scene, size=image.width), thing), default=0)
    return sum(area > expected / 2 for area in _regions(image, thing))


def _countable(scene: Scene, size: int) -> bool:
    if len({thing.colour for thing in scene.things}) < 2:
        return False
    whole, empty = render(scene, size=size), render(Scene((), scene.place), size=size)
    areas = [(max(_regions(whole, thing), default=0), max(_regions(empty, thing), default=0)) for thing in scene.things]
    return all(area > size * size / 350 and background < area / 5 for area, background in areas)


def _regions(image: Image.Image, thing: Thing) -> list[int]:
    """Areas, in pixels, of the connected regions of a thing's colour."""
    difference = np.abs(np.asarray(image.convert("RGB"), int) - COLOURS[thing.colour]).max(-1)
    labels, _ = ndimage.label(difference < TOLERANCE, structure=np.ones((3, 3)))
    return np.bincount(labels.ravel())[1:].tolist()
