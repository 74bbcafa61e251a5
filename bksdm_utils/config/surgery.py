"""Parameters of notebooks 00 to 02."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, NamedTuple

from pydantic import AfterValidator

from .base import Config, PathText, Positive, parameter
from .shared import Common, Teacher
from .training import Count


class Budget(NamedTuple):
    """The share of the teacher's cost, "macs" or "params", that a plan may have."""

    kind: str
    share: float

    @classmethod
    def read(cls, text: str) -> Budget:
        """A budget from text such as macs:0.6."""
        if not re.fullmatch(r"(macs|params):(0?\.\d+|1|1\.0+)", text) or float(text.split(":")[1]) == 0:
            raise ValueError(f"budget is {text!r}: expected macs or params, a colon and a share of the teacher's, "
                             "macs:0.6")  # fmt: skip
        kind, share = text.split(":")
        return cls(kind, float(share))


def _budget(text: str) -> str:
    Budget.read(text)
    return text


class Samples(Config):
    """A few images of held-out captions."""

    num_images: Positive = parameter(8, "held-out captions sampled and scored")
    num_inference_steps: Positive = parameter(25, "denoising steps for each image")
    guidance_scale: float | None = parameter(None, "strength of classifier-free guidance")
    clip: PathText | None = parameter(None, "CLIP folder or hub id of the scores; None: the preset's")


class StorybookWorld(Samples, Common):
    """Notebook 00: the embedded teacher, and how it was made."""

    notebook: ClassVar[str] = "00_storybook_world"
    num_images: Positive = parameter(32, "held-out captions sampled and scored, 3 or more")
    guidance_scale: float = parameter(2.0, "strength of classifier-free guidance")
    clip: PathText = parameter("data/storybook/clip", "CLIP folder or hub id of the scores")
    train: bool = parameter(False, "make the networks again and show them instead of the committed ones; resumes")
    train_steps: Positive | None = parameter(None, "optimizer steps of each network, to try it out; None is all")


class ArchitectureSurgery(Samples, Teacher):
    """Notebook 01: plans, costs, and what each removal does."""

    notebook: ClassVar[str] = "01_architecture_surgery"
    num_inference_steps: Positive = parameter(20, "denoising steps for each image")
    student: PathText | None = parameter(None, "somebody's U-Net folder or hub id, to find out which plan it follows")
    greedy_steps: Count = parameter(6, "how many units are removed one after another")
    budget: Annotated[str, AfterValidator(_budget)] | None = parameter(
        None, "search a plan of at most this cost, macs:0.6 or params:0.5; None: of the named plans' MACs"
    )
    latency_repeats: Count | None = parameter(None, "timed passes of each U-Net; 0 leaves the timing out")


class WeightCopying(Samples, Teacher):
    """Notebook 02: where each student weight comes from."""

    notebook: ClassVar[str] = "02_weight_copying"
    num_images: Positive = parameter(6, "held-out captions sampled and scored")
