"""Quick scores of a pipeline on fixed captions, to follow a training by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from PIL import Image

from ..config.presets import Preset
from ..data.rendering import render
from ..data.scenes import sample_scene
from ..files import resolve
from ..models.pipelines import Pipeline
from .metrics import clip_score, fid, zero_shot_accuracy
from .networks import MetricClip
from .sampling import generate

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
        self.judge = MetricClip(resolve(settings.judge), device) if settings.judge and storybook_only else None
        if storybook_only:
            self.scenes = [sample_scene(i, "test") for i in range(settings.num_images)]
            self.captions = [scene.caption for scene in self.scenes]
            numbers = range(settings.num_validation_images)
            self.validation_scenes = [sample_scene(i, "validation") for i in numbers]

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
        return self.judge.pictures([render(scene, seed) for seed, scene in enumerate(scenes)])
