"""Teachers and the settings that suit them. A notebook parameter that is `None` takes its value from the preset."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Preset:
    """A teacher, and how its students are trained and judged.

    Attributes:
        teacher: a diffusers Stable Diffusion folder or hub id.
        judge: a CLIP for the CLIP score; None scores nothing.
        train_data_dir: an image-text folder; None renders storybook scenes.
        resolution: pixels a side of the training pictures.
        flip: whether pictures may be mirrored; storybook's captions say left and right, so there they may not.
        measured: whether these settings have been run to the end by the authors.
    """

    name: str
    teacher: str
    judge: str | None
    train_data_dir: str | None
    resolution: int = 512
    flip: bool = True
    batch_size: int = 64
    gradient_accumulation_steps: int = 4
    max_train_steps: int = 50_000
    learning_rate: float = 5e-5
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 0
    ema_decay: float = 0.9999
    mixed_precision: str = "bf16"
    lambda_sd: float = 1.0
    lambda_kd_output: float = 1.0
    lambda_kd_feat: float = 1.0
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    num_images: int = 8
    num_train_scenes: int = 0  # storybook only: how many scenes are rendered for training
    validation_steps: int = 500
    measured: bool = False

    def with_parameters(self, **parameters) -> Preset:
        """This preset with every parameter that is not None put in place of its own.

        Raises:
            ValueError: a number is out of its range.
        """
        known = {field.name for field in fields(self)}
        given = {k: v for k, v in parameters.items() if v is not None and k in known}
        changed = replace(self, **given)
        changed.check()
        return changed

    def check(self) -> None:
        """Raises ValueError for sizes, rates and counts that cannot be meant."""
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            if field.type in ("int", "float") and not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{field.name} is {value!r}: expected a {'whole ' if whole else ''}number")
        if self.num_inference_steps < 4:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}: expected 4 or more, as PNDM needs")
        positive = ("resolution", "batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate",
                    "num_inference_steps", "num_images", "validation_steps")  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a positive number")
        for name in ("lambda_sd", "lambda_kd_output", "lambda_kd_feat", "guidance_scale", "lr_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected zero or more")
        if self.resolution % 8:
            raise ValueError(f"resolution is {self.resolution}: expected a multiple of 8")


STORYBOOK = Preset(
    "storybook", "data/storybook/teacher", "data/storybook/clip", None,
    resolution=64, flip=False, batch_size=16, gradient_accumulation_steps=1, max_train_steps=400, learning_rate=1e-3,
    lr_schedule="cosine", lr_warmup_steps=20, ema_decay=0.98, mixed_precision="no", guidance_scale=2.0, num_images=64,
    num_train_scenes=3_000, validation_steps=100, measured=True,
)  # fmt: skip

SD_V1_UNET = {  # the facts of SD-v1.4's and v1.5's U-Net config that architecture and costs depend on
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "mid_block_type": "UNetMidBlock2DCrossAttn",
}  # fmt: skip

LAION_AES = "data/laion_aes/preprocessed_212k"

PRESETS: dict[str, Preset] = {
    "storybook": STORYBOOK,
    "sd-v1.4": Preset("sd-v1.4", "CompVis/stable-diffusion-v1-4", None, LAION_AES),
    "sd-v1.5": Preset("sd-v1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", None, LAION_AES),
}


def find_preset(name: str, **parameters) -> Preset:
    """A preset by name, with the notebook's parameters in place; others are the notebook's own.

    Raises:
        ValueError: the name is unknown or a parameter is out of range.
    """
    if (parameters.get("seed") or 0) < 0:
        raise ValueError(f"seed is {parameters['seed']}: expected zero or more")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name].with_parameters(**parameters)


def resolve(place: str | Path) -> str:
    """A folder, also when given relative to the repository's root; anything else is taken for a hub id."""
    for candidate in (Path(place), ROOT / place):
        if candidate.exists():
            return str(candidate)
    return str(place)
