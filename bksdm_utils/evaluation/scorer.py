"""Quick scores of a pipeline on fixed captions, to validate a training or compare cut U-Nets (notebooks 00 to 03)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice

import numpy as np
import torch
from PIL import Image

from ..config.base import Config
from ..config.evaluation import FolderSampling
from ..config.shared import prompts_of
from ..data.rendering import render
from ..data.scenes import Scene, sample_scene
from ..models.pipelines import Pipeline
from .metrics import clip_score, fid, pixel_distance, zero_shot_accuracy
from .networks import MetricClip
from .sampling import generate

PROMPTS = (
    "a photo of a golden retriever puppy in the snow", "a bowl of ramen on a wooden table",
    "a lighthouse at sunset, oil painting", "a red bicycle leaning against a brick wall",
    "portrait of an old fisherman with a white beard", "a city street at night in the rain",
    "a castle on a hill, watercolor", "a vase of tulips by the window",
)  # fmt: skip


PREVIEWED = 8  # of storybook's validation images


@dataclass(frozen=True)
class FixedPrompts:
    """Prompts that any pipeline samples from the same noise, and the CLIP that scores the images, if one is at hand."""

    captions: Sequence[str]
    sampling: FolderSampling
    clip: MetricClip | None

    def sample(self, pipeline: Pipeline) -> list[Image.Image]:
        """One image for each prompt."""
        return generate(pipeline, self.captions, **self.sampling.values())

    def scores(self, images: Sequence[Image.Image]) -> dict[str, float]:
        """CLIP score of one image for each prompt; empty without a CLIP model."""
        return {"clip_score": round(clip_score(self.clip, images, self.captions), 4)} if self.clip else {}


class Scorer:
    """Samples the same captions from the same noise with any pipeline, and scores the images.

    For storybook they are held-out scenes, other ones for `validate` than for `scores`; for other teachers `PROMPTS`,
    whose images are not scored.

    Args:
        config: has clip, num_images and fields of `FolderSampling`; may have preset, train_data_dir,
            sampling_batch_size, num_validation_images and validation_prompts.
    """

    def __init__(self, config: Config, device: str = "cpu"):
        values = config.values()
        own_data = values.get("train_data_dir") is not None  # storybook's CLIP model knows no other images
        self.storybook = values.get("preset", "storybook") == "storybook" and not own_data
        self.config, self.device = config, device
        self.sampling = config.part(FolderSampling, batch_size=values.get("sampling_batch_size") or 16)
        self.clip = MetricClip(config.clip, device) if config.clip and self.storybook else None
        self.scenes = [sample_scene(i, "test") for i in range(config.num_images)] if self.storybook else []
        self.captions = [scene.caption for scene in self.scenes] or list(PROMPTS[: config.num_images])

    def sample(self, pipeline: Pipeline) -> list[Image.Image]:
        """One image for each caption."""
        return generate(pipeline, self.captions, **self.sampling.values())

    def scores(
        self, images: Sequence[Image.Image], teacher_images: Sequence[Image.Image] | None = None
    ) -> dict[str, float]:
        """CLIP score, zero-shot accuracies, mean distance to the teacher's images; empty without a CLIP model."""
        if self.clip is None:
            return {}
        scores = {"clip_score": clip_score(self.clip, images, self.captions)}
        scores |= zero_shot_accuracy(self.clip, images, self.scenes)
        if teacher_images:
            scores["distance"] = float(np.mean(list(map(pixel_distance, images, teacher_images))))
        return {name: round(value, 4) for name, value in scores.items()}

    def validate(self, pipeline: Pipeline, num_inference_steps: int = 10) -> dict[str, float]:
        """CLIP score, and FID against real renders of the same scenes, of quick samples; NaN without a CLIP model."""
        if self.clip is None:
            return {"clip_score": float("nan"), "fid": float("nan")}
        captions = [scene.caption for scene in self.validation_scenes]
        images = generate(pipeline, captions, **self.sampling.but(num_inference_steps=num_inference_steps).values())
        distance = fid(self.clip.image_network(images), self._real_features)
        return {"clip_score": round(clip_score(self.clip, images, captions), 4), "fid": round(distance, 3)}

    @property
    def validation(self) -> Callable[[Pipeline], dict[str, float]] | None:
        """`validate`, or None without a CLIP model, when nothing could be scored."""
        return self.validate if self.clip else None

    @property
    def preview(self) -> FixedPrompts:
        """What teacher and student sample at each validation: `validation_prompts`, in turn, or some of these captions.

        Prompts of one's own are scored where `clip` names a CLIP model.
        """
        given = prompts_of(self.config.validation_prompts)
        count = min(PREVIEWED, self.config.num_validation_images) if self.storybook else None
        known = [scene.caption for scene in self.validation_scenes[:count]] if self.storybook else PROMPTS
        prompts = islice(cycle(given or known), count or self.config.num_validation_images)
        own = self.config.clip and not self.storybook  # `validate` scores more of storybook's
        clip = MetricClip(self.config.clip, self.device) if own else None
        return FixedPrompts(list(prompts), self.sampling, clip)

    @cached_property
    def validation_scenes(self) -> list[Scene]:
        """Held-out scenes that `scores` does not use."""
        return [sample_scene(i, "validation") for i in range(self.config.num_validation_images)]

    @cached_property
    def _real_features(self) -> torch.Tensor:
        return self.clip.image_network([render(scene, seed) for seed, scene in enumerate(self.validation_scenes)])
