"""Parameters of training."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

OPTIMIZERS = ("adamw", "adamw_8bit")


TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; a step is always an optimizer step.

    One step learns from `batch_size * gradient_accumulation_steps` examples, the global batch, however many processes
    share it. `batch_size` is what one process may hold at once.
    """

    max_train_steps: int
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    lr_schedule: str = "constant"  # constant | linear | cosine, the last two fall to zero
    lr_decay_start: float = 0.0  # share of the run after which a falling schedule begins to fall
    lr_warmup_steps: int = 0
    adam_beta2: float = 0.999
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    ema_device: str | None = None  # "cpu" frees a GPU of the averaged weights; None keeps them beside the model
    optimizer: str = "adamw"  # adamw | adamw_8bit, whose state takes a quarter of the memory
    mixed_precision: str = "no"  # no | fp16 | bf16
    seed: int = 0
    checkpoint_steps: int = 0  # 0 keeps none, not on an interruption either
    checkpoints_kept: int = 2  # the newest ones
    max_skipped_steps: int = 20  # so many in a row without a finite gradient end the run
    trackers: tuple[str, ...] = ()  # tensorboard, wandb

    def __post_init__(self):
        for name in ("max_train_steps", "batch_size", "gradient_accumulation_steps", "learning_rate",
                     "checkpoints_kept"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a positive number")
        if self.lr_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"unknown lr_schedule {self.lr_schedule!r}: expected constant, linear or cosine")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        for name in self.trackers:
            if name not in TRACKERS or importlib.util.find_spec(name) is None:
                raise ValueError(f"tracker {name!r} is unknown or not installed: expected {' or '.join(TRACKERS)} (pip "
                                 "install 'bksdm_utils[trackers]')")  # fmt: skip

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
        """Learning rate of optimizer step `step` (from 0): warm-up, plateau, fall."""
        warmup = min(1.0, (step + 1) / (self.lr_warmup_steps + 1))
        start = self.lr_decay_start * self.max_train_steps
        done = min(1.0, max(0.0, (step - start) / (self.max_train_steps - start)))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * warmup * fall[self.lr_schedule]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
