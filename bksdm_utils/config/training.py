"""Parameters of training, and of notebook 03."""

from __future__ import annotations

import importlib.util
import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from .base import Config, NonNegative, PathText, Positive, Processes, Seed, Share, parameter
from .shared import PresetSampling, Teacher, prompts_of

Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=8, multiple_of=8)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0)]
OWN_SCHEDULES = ("constant", "linear", "cosine")
Schedule = Literal["constant", "linear", "cosine", "constant_with_warmup", "cosine_with_restarts", "polynomial"]
POLYNOMIAL_END = 1e-7  # the rate at which diffusers' polynomial schedule ends


class Training(Config):
    """How a model is trained; a step is always an optimizer step.

    One step takes `batch_size * gradient_accumulation_steps` examples, the global batch, however many processes share
    it. `batch_size` is what one process holds at once.
    """

    seed: Seed = parameter(0, "of noise, data order and random weights")
    batch_size: Positive = parameter(16, "images per micro-batch, the most that one process holds", heading="training")
    gradient_accumulation_steps: Positive = parameter(1, "micro-batches per optimizer step, shared by all processes")
    max_train_steps: Positive = parameter(1000, "optimizer steps")
    learning_rate: NonNegative = parameter(5e-5, "of AdamW")
    lr_schedule: Schedule = parameter(
        "constant", "constant, linear, cosine; constant_with_warmup, cosine_with_restarts, polynomial of diffusers"
    )
    lr_warmup_steps: Count = parameter(0, "steps until the rate is reached")
    lr_decay_start: Share = parameter(0.0, "share of the run after which linear and cosine begin to fall")
    ema_decay: Share = parameter(0.999, "decay of the averaged (EMA) weights; 0 keeps no average")
    mixed_precision: Literal["no", "fp16", "bf16"] = parameter("no", "no, fp16 or bf16; on a CPU always no")
    checkpoint_steps: Count = parameter(0, "steps between two checkpoints; 0 keeps none")
    checkpoints_kept: Count = parameter(2, "the newest ones; 0 keeps all")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = parameter(
        (), "tensorboard, wandb; log.csv is always written"
    )
    checkpoint: PathText | None = parameter(None, "which one `resume` continues from; None: the newest")
    scale_lr: bool = parameter(False, "multiply the rate by the images of a step", heading="training: seldom changed")
    lr_num_cycles: Positive = parameter(1, "falls of cosine_with_restarts")
    lr_power: NonNegative = parameter(1.0, "exponent of polynomial")
    optimizer: Literal["adamw", "adamw_8bit"] = parameter("adamw", "adamw, or adamw_8bit from bitsandbytes")
    adam_beta1: Decay = parameter(0.9, "decay of AdamW's first moment")
    adam_beta2: Decay = parameter(0.999, "decay of AdamW's second moment")
    adam_epsilon: Epsilon = parameter(1e-8, "added to AdamW's denominator")
    weight_decay: NonNegative = parameter(1e-2, "of AdamW")
    max_grad_norm: NonNegative = parameter(1.0, "gradients are clipped to this norm; 0 clips none")
    ema_device: Literal["cpu"] | None = parameter(None, "cpu keeps the averaged weights off the GPU")
    tf32: bool = parameter(True, "what stays in fp32 is multiplied in TF32 on a GPU")
    max_skipped_steps: Positive = parameter(20, "abort after this many consecutive non-finite gradients")

    @field_validator("trackers")
    @classmethod
    def _installed(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        for name in trackers:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"trackers: {name} is not installed: pip install 'bksdm_utils[trackers]'")
        return trackers

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.ema_device and self.ema_decay == 0:
            raise ValueError("ema_device is cpu, ema_decay 0: without an average there is nothing to keep there")
        if self.lr_decay_start and self.lr_schedule not in (None, "linear", "cosine"):
            raise ValueError(f"lr_decay_start is {self.lr_decay_start}, lr_schedule {self.lr_schedule}: only linear "
                             "and cosine begin to fall later")  # fmt: skip
        if self.lr_schedule == "polynomial" and (self.learning_rate or 1) <= POLYNOMIAL_END:
            raise ValueError(f"learning_rate is {self.learning_rate}: polynomial falls to {POLYNOMIAL_END} from more")
        if self.checkpoint and not getattr(self, "resume", True):
            raise ValueError(f"checkpoint is {self.checkpoint}, resume False: resume=True continues from it")
        return self

    @property
    def peak_rate(self) -> float:
        """The learning rate after warm-up."""
        return self.learning_rate * self.global_batch_size if self.scale_lr else self.learning_rate

    @property
    def global_batch_size(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def micro_batches(self, num_processes: int) -> tuple[int, int]:
        """(size, number) of the micro-batches of one process in one step.

        Raises:
            ValueError: the processes cannot share the global batch evenly.
        """
        share, rest = divmod(self.global_batch_size, num_processes)
        if rest or not share:
            raise ValueError(f"{num_processes} processes cannot share a global batch of {self.global_batch_size} "
                             "(batch size times accumulation) evenly: choose a multiple of their number")  # fmt: skip
        size = max(size for size in divisors(share) if size <= self.batch_size)
        return size, share // size

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0): warm-up, plateau, fall.

        constant, linear and cosine warm up from 1 / (lr_warmup_steps + 1); the others are diffusers' `get_scheduler`.
        """
        if self.lr_schedule not in OWN_SCHEDULES:
            return self.peak_rate * self._diffusers_share(step)
        warmup = min(1.0, (step + 1) / (self.lr_warmup_steps + 1))
        start = self.lr_decay_start * self.max_train_steps
        done = min(1.0, max(0.0, (step - start) / (self.max_train_steps - start)))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.peak_rate * warmup * fall[self.lr_schedule]

    def _diffusers_share(self, step: int) -> float:
        if step < self.lr_warmup_steps:
            return step / self.lr_warmup_steps
        done = min(1.0, (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps))
        end = POLYNOMIAL_END / self.peak_rate
        cycle = self.lr_num_cycles * done % 1 if done < 1 else 1.0
        return {"constant_with_warmup": 1.0, "cosine_with_restarts": (1 + math.cos(math.pi * cycle)) / 2,
                "polynomial": (1 - end) * (1 - done) ** self.lr_power + end}[self.lr_schedule]  # fmt: skip


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


class Cropping(Config):
    """How a square is made of an image: the shorter side is scaled, the rest cut off."""

    random_crops: Count = parameter(
        0, "crops of each image, one chosen at each use; 0: the centre alone", heading="images"
    )
    interpolation: Literal["bicubic", "bilinear"] = parameter("bicubic", "of scaled images, bicubic or bilinear")

    @property
    def crop_key(self) -> str:
        """The crop in a cache's key."""
        crop = f"random{self.random_crops}" if self.random_crops else "centre"
        return crop if self.interpolation == "bicubic" else f"{crop}-{self.interpolation}"


class TrainingData(Cropping):
    """What is trained on."""

    max_train_samples: Positive | None = parameter(None, "the first so many usable images; None: all")
    train_data_dir: PathText | None = parameter(None, "folder with metadata.csv; parquet or tar shards; hub data set")
    image_column: str | None = parameter(None, "column of the images; None: image")
    caption_column: str | None = parameter(None, "column of the captions; None: text")
    streaming: bool | None = parameter(None, "read shards or a hub data set as they come, without a cache")
    cache_dir: PathText | None = parameter(None, "latent cache, 28 GB for LAION's 212,000 images; None: outputs/cache")
    resolution: Side | None = parameter(None, "pixels a side of the training images")
    flip: bool | None = parameter(None, "whether images may be mirrored (storybook's captions say left and right)")
    num_train_scenes: Count | None = parameter(None, "storybook: scenes rendered for training")

    @model_validator(mode="after")
    def _streams_have_a_source(self) -> Self:
        if self.streaming and self.train_data_dir is None:
            raise ValueError("streaming needs shards or a hub data set: name them by train_data_dir")
        if self.streaming and self.max_train_samples:
            raise ValueError("max_train_samples needs a data set of known order: streaming reads shards in any order")
        return self

    @property
    def num_views(self) -> int:
        """Versions of each image in the cache: crops, each also mirrored with `flip`."""
        return max(1, self.random_crops) * (1 + self.flip)


_KD = ("batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "lr_schedule",
       "lr_warmup_steps", "ema_decay", "mixed_precision", "checkpoint_steps")  # fmt: skip


class KDTraining(PresetSampling, TrainingData, Training.preset_decides(*_KD), Teacher):
    """Notebook 03: knowledge distillation."""

    notebook: ClassVar[str] = "03_kd_training"
    lambda_sd: NonNegative | None = parameter(None, "weight of the task loss", heading="distillation")
    lambda_kd_output: NonNegative | None = parameter(None, "weight of the output distillation")
    lambda_kd_feat: NonNegative | None = parameter(None, "weight of the feature distillation")
    kd: Literal["block", "self_attention", "segmind"] = parameter(
        "block", "taps: block (BK-SDM), self_attention (KOALA) or segmind (distill-sd)"
    )
    copy_weights: bool = parameter(True, "start from the teacher's weights, not from random ones")
    published_tiny: bool = parameter(False, "as the original trained bk_tiny: the third encoder tap has no gradient")
    normalise_features: bool = parameter(False, "divide each tap's loss by the teacher's mean square there")
    min_snr_gamma: NonNegative = parameter(0.0, "min-SNR weighting of the task loss, 5 is usual, 0 is off")
    caption_dropout: Share = parameter(0.0, "probability of an empty caption")
    random_conditioning: NonNegative = parameter(
        0.0, "rate of unrelated captions (arXiv 2504.02011), 5 there, 0 is off"
    )
    noise_offset: NonNegative = parameter(0.0, "strength of a shift of the noise common to all pixels")
    find_batch_size: bool = parameter(
        False, "measure the fastest micro-batch that fits; the global batch stays", heading="speed and memory"
    )
    gradient_checkpointing: bool | None = parameter(None, "less memory, more time; None: if the GPU needs it")
    channels_last: bool = parameter(True, "memory layout in which convolutions are faster")
    low_precision_norms: bool = parameter(True, "norms in the run's precision, not in fp32: faster, less memory")
    compiled: bool | None = parameter(None, "torch.compile, minutes at the start; None: in long runs on a GPU")
    num_processes: Processes = parameter(None, "None trains in this kernel; a number in processes that outlive it")
    num_images: Positive | None = parameter(None, "held-out captions sampled and scored", heading="evaluation")
    sampling_batch_size: Positive | None = parameter(None, "images in one pass on a GPU")
    clip: PathText | None = parameter(None, "CLIP folder or hub id of the scores; None: the preset's")
    validation_steps: Positive | None = parameter(None, "steps between two validations")
    validation_prompts: str | None = parameter(
        None, "then sampled by teacher and student, | between two; None: built-in ones"
    )
    num_validation_images: Positive | None = parameter(None, "images of each validation")
    ablation: Literal["paper", "all"] = parameter("paper", "paper compares its own parts; all adds later ideas")
    ablation_steps: Count = parameter(80, "optimizer steps of each ablation run; 0 leaves it out")
    ablation_seeds: Positive = parameter(1, "how many seeds the ablation is repeated with")
    resume: bool = parameter(False, "continue from this folder's newest checkpoint, or from `checkpoint`")

    @model_validator(mode="after")
    def _distils_what_it_says(self) -> Self:
        if self.validation_prompts is not None and not prompts_of(self.validation_prompts):
            raise ValueError("validation_prompts is empty: expected texts with | between them, or None")
        if self.published_tiny and (self.variant not in (None, "bk_tiny") or self.kd != "block"):
            raise ValueError(f"published_tiny is about bk_tiny's block taps: variant is {self.variant}, kd {self.kd}")
        return self
