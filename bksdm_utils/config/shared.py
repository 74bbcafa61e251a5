"""Parameters that several notebooks share, under one name and one description."""

from __future__ import annotations

from typing import Literal

from typing_extensions import Self

from .base import Config, Device, NonNegative, PathText, Positive, Seed, parameter
from .presets import PRESETS, Preset

SCHEDULERS = Literal["pndm", "dpm++", "euler", "ddim", "lcm"]
VARIANTS = "bk_base, bk_small, bk_tiny; SDXL: bk_sdxl_base, bk_sdxl_small, koala_1b, koala_700m; or a plan's .json"


def prompts_of(text: str | None) -> list[str]:
    """The prompts in a parameter such as `validation_prompts`, which has | between them."""
    return [prompt.strip() for prompt in (text or "").split("|") if prompt.strip()]


class Common(Config):
    """What every notebook has."""

    seed: Seed = parameter(0, "of noise, data order and random weights")
    device: Device = parameter("auto", "auto, cuda, mps or cpu; auto takes the first that exists (mps: not yet run)")
    output_dir: PathText | None = parameter(None, "folder of this run; None: outputs/<notebook>/<preset>-<variant>")


class Teacher(Common):
    """The teacher, the plan of its student, and a preset, whose values `filled` gives to what is None."""

    preset: str = parameter("storybook", f"{', '.join(PRESETS)}; decides what is None below")
    teacher: PathText | None = parameter(None, "any diffusers Stable Diffusion folder or hub id")
    variant: str | None = parameter(None, VARIANTS)

    @classmethod
    def filled(cls, **values: object) -> Self:
        """The parameters with the preset's values in place of None.

        Raises:
            ValueError: an unknown preset or parameter, or a value that does not fit.
        """
        given = cls(**values)
        preset = given.chosen_preset.values_for(cls.__name__).items()
        return given.but(**{n: v for n, v in preset if n in cls.model_fields and getattr(given, n) is None})

    @property
    def chosen_preset(self) -> Preset:
        """The preset itself; ValueError where there is none of this name."""
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}: expected one of {', '.join(PRESETS)}")
        return PRESETS[self.preset]

    @property
    def own_teacher(self) -> bool:
        """Whether the teacher is another than the preset's."""
        return self.teacher not in (None, self.chosen_preset.teacher)


class Sampling(Config):
    """How images are sampled."""

    num_inference_steps: Positive = parameter(25, "denoising steps for each image", heading="sampling")
    guidance_scale: NonNegative = parameter(7.5, "strength of classifier-free guidance")
    scheduler: SCHEDULERS | None = parameter(None, "pndm, dpm++, euler, ddim or lcm; None is the teacher's own")


PresetSampling = Sampling.preset_decides("num_inference_steps", "guidance_scale")
