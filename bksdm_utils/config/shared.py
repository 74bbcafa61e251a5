"""Parameters that several notebooks share, under one name and one description."""

from __future__ import annotations

from typing import ClassVar, Literal

from typing_extensions import Self

from .base import Config, Device, NonNegative, PathText, Positive, Seed, parameter
from .presets import PRESETS, Preset, find_preset

SCHEDULERS = Literal["pndm", "dpm++", "euler", "ddim", "lcm"]
VARIANTS = "bk_base, bk_small, bk_tiny; SDXL: bk_sdxl_base, bk_sdxl_small, koala_1b, koala_700m; or a plan's .json"


class Common(Config):
    """What every notebook has."""

    seed: Seed = parameter(0, "of noise, data order and random weights")
    device: Device = parameter("auto", "auto, cuda, mps or cpu; auto takes the first that exists (mps: not yet run)")
    output_dir: PathText | None = parameter(None, "folder of this run; None: outputs/<notebook>/<preset>-<variant>")


class Teacher(Common):
    """The teacher and the settings that suit it; `filled` gives the preset's values to what is None."""

    preset_class: ClassVar[str | None] = None  # whose values a preset has; the class's own name by default

    preset: str = parameter("storybook", f"{', '.join(PRESETS)}; decides what is None below")
    teacher: PathText | None = parameter(None, "any diffusers Stable Diffusion folder or hub id")

    @classmethod
    def filled(cls, **values: object) -> Self:
        """The parameters with the preset's values in place of None.

        Raises:
            ValueError: an unknown preset or parameter, or a value that does not fit.
        """
        given = cls(**values)
        preset = find_preset(given.preset)
        own = {name: value for name, value in preset.values_for(cls.preset_class or cls.__name__).items()
               if name in cls.model_fields and getattr(given, name) is None}  # fmt: skip
        return given.but(**own)

    @property
    def chosen_preset(self) -> Preset:
        """The preset itself."""
        return find_preset(self.preset)

    @property
    def own_teacher(self) -> bool:
        """Whether the teacher is another than the preset's."""
        return self.teacher not in (None, self.chosen_preset.teacher)


class Student(Teacher):
    """A teacher and the removal plan of its student."""

    variant: str | None = parameter(None, VARIANTS)


class Sampling(Config):
    """How images are sampled."""

    num_inference_steps: Positive = parameter(25, "denoising steps for each image")
    guidance_scale: NonNegative = parameter(7.5, "strength of classifier-free guidance")
    scheduler: SCHEDULERS | None = parameter(None, "pndm, dpm++, euler, ddim or lcm; None is the teacher's own")
