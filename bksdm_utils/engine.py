"""The one training engine, on accelerate: everything that learns here learns through `Trainer`.

Every random choice is a function of (seed, optimizer step, position in the global batch), see `Draw`. A run that was
killed and resumed, or that is spread over two processes, therefore sees the same examples with the same noise.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather
from diffusers.training_utils import EMAModel


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; a step is always an optimizer step."""

    max_train_steps: int
    batch_size: int = 16  # per process and micro-batch
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    lr_schedule: str = "constant"  # constant | linear | cosine, the last two fall to zero
    lr_decay_start: float = 0.0  # share of the run after which a falling schedule begins to fall
    lr_warmup_steps: int = 0
    adam_beta2: float = 0.999
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"  # no | fp16 | bf16
    seed: int = 0
    checkpoint_steps: int = 0  # 0 keeps none, not on an interruption either
    max_skipped_steps: int = 20  # so many in a row without a finite gradient end the run

    def __post_init__(self):
        for name in ("max_train_steps", "batch_size", "gradient_accumulation_steps", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a positive number")
        if self.lr_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"unknown lr_schedule {self.lr_schedule!r}: expected constant, linear or cosine")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0): warm-up, plateau, fall."""
        warmup = min(1.0, (step + 1) / (self.lr_warmup_steps + 1))
        start = self.lr_decay_start * self.max_train_steps
        done = min(1.0, max(0.0, (step - start) / (self.max_train_steps - start)))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * warmup * fall[self.lr_schedule]


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


@dataclass
class Draw:
    """One micro-batch's random choices: which examples, and a generator of its own for each of them.

    Attributes:
        indices: the examples, one epoch being a permutation of all `num_examples`.
        generators: CPU generators seeded by (seed, step, position in the global batch).
    """

    seed: int
    step: int
    positions: range
    global_batch_size: int
    num_examples: int
    indices: list[int] = field(init=False)
    generators: list[torch.Generator] = field(init=False)

    def __post_init__(self):
        places = [self.step * self.global_batch_size + p for p in self.positions]
        epochs = [divmod(place, self.num_examples) for place in places]
        self.indices = [int(_shuffled(self.seed, epoch, self.num_examples)[i]) for epoch, i in epochs]
        states = [np.random.SeedSequence((self.seed, self.step, p)).generate_state(2) for p in self.positions]
        self.generators = [torch.Generator().manual_seed(int(a) << 32 | int(b)) for a, b in states]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values, (batch, *shape), on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def integers(self, high: int) -> torch.Tensor:
        """Integers below `high`, (batch,)."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self.generators])

    def uniform(self) -> torch.Tensor:
        """Values in [0, 1), (batch,)."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports: number (from 1), losses (detached, still on the device), the gradient's norm
    before clipping, whether the step was left out for want of a finite gradient, rate, seconds."""

    step: int
    losses: dict[str, torch.Tensor]
    gradient_norm: float
    skipped: bool
    learning_rate: float
    seconds: float

    def floats(self) -> dict[str, float]:
        """Everything as plain numbers; this is where the losses leave the device."""
        losses = {name: float(value) for name, value in self.losses.items()}
        own = {"gradient_norm": self.gradient_norm, "skipped": float(self.skipped), "learning_rate": self.learning_rate}
        return {"step": self.step, **losses, **own, "seconds": round(self.seconds, 3)}


class Log:
    """A CSV file of one row per logged step; on resumption rows of steps that are done again are dropped first."""

    def __init__(self, path: Path, step: int = 0):
        self.path, self.rows = path, []
        path.parent.mkdir(parents=True, exist_ok=True)
        if step and path.exists():
            with path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if all(row.values())]  # a kill may cut the last one short
                rows = [{k: float(v) for k, v in row.items()} for row in whole]
            self.rows = [row for row in rows if row["step"] <= step]
        self._write("w", self.rows)

    def append(self, row: dict[str, float]) -> None:
        """Adds one row; all rows have the same columns."""
        self.rows.append(row)
        self._write("a", [row])

    def _write(self, mode: str, rows: list[dict]) -> None:
        with self.path.open(mode, newline="") as file:
            if rows:
                writer = csv.DictWriter(file, rows[0])
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)


def over_processes(function: Callable[[list[int]], torch.Tensor], count: int, device: str = "cpu") -> torch.Tensor:
    """`function(range(count))`, each process computing its share of the rows; all get the whole."""
    with PartialState(cpu=device == "cpu").split_between_processes(list(range(count))) as share:
        return gather(function(share))


LossFunction = Callable[[torch.nn.Module, Draw], dict[str, torch.Tensor]]


class Trainer:
    """A model, its optimizer, its EMA and the step they stand at.

    The EMA starts as a copy of the model as given. `model` is unwrapped and holds the raw weights; `with
    trainer.ema_weights():` lends it the averaged ones.

    Args:
        resume: go on from the checkpoint in `output_dir`, if there is one.
        fingerprint: what else must be as it was for a resumption to be the same run: teacher, data, loss weights …

    Raises:
        ValueError: the checkpoint cannot be read, is of another run, or is further than `max_train_steps`.
    """

    def __init__(
        self, model: torch.nn.Module, config: TrainingConfig, output_dir: str | Path, resume: bool = False,
        fingerprint: Mapping[str, object] | None = None,
    ):  # fmt: skip
        self.config, self.output_dir, self.model = config, Path(output_dir), model
        self.fingerprint = {name: str(value) for name, value in (fingerprint or {}).items()}
        cpu = next(model.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, (0.9, config.adam_beta2), weight_decay=config.weight_decay
        )
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        self.step = 0
        if resume:
            self._load(optimizer)
        else:
            self.checkpoint.unlink(missing_ok=True)  # a later resume must not go on from an older run
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        # accelerate wraps forward in autocast for good; `_backward` does so itself, so drawing stays in full precision.
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)

    def steps(self, loss_function: LossFunction, num_examples: int) -> Iterator[Step]:
        """Trains, yielding after every optimizer step; the caller owns logging, plots and validation.

        SIGINT and SIGTERM end the training after the step in progress, with a checkpoint where any are kept.

        Args:
            loss_function: (model, draw) -> named losses; "loss" is what is minimised, the others are only reported.
            num_examples: size of the data set that `draw.indices` points into.
        """
        self.model.train()
        self.skipped_in_a_row = 0
        with _signals_noted() as signals:
            while self.step < self.config.max_train_steps:
                yield self._step(loss_function, num_examples)
                # Only now, when the caller has logged the step, may a checkpoint say that it is done.
                due = self.step % self.config.checkpoint_steps == 0 if self.config.checkpoint_steps else False
                if due or (signals and self.config.checkpoint_steps):
                    self.save()
                if signals:
                    self._stop(signals[0])

    def _step(self, loss_function: LossFunction, num_examples: int) -> Step:
        """One optimizer step, or none where the gradient is not finite; its random numbers are used up either way."""
        started = time.perf_counter()
        rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self._backward(loss_function, num_examples)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        norm = float(norm if norm is not None else math.nan)
        scaled = self.accelerator.scaler is not None  # fp16: the scaler itself leaves such steps out, and must see them
        finite = math.isfinite(norm)
        if finite or scaled:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            self.ema.step(self.parameters)
        self.step += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            self._give_up(norm)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # so that the seconds are those of the step
        return Step(self.step, losses, norm, not finite, rate, time.perf_counter() - started)

    def _give_up(self, norm: float) -> None:
        good = f"the last good state is {self.checkpoint}" if self.checkpoint.exists() else "there is no checkpoint"
        raise FloatingPointError(
            f"{self.skipped_in_a_row} steps in a row up to step {self.step} had no finite gradient (norm {norm}): the "
            f"model is as it was before them, {good}. Lower the learning rate, or use bf16 or no mixed precision."
        )

    def _stop(self, signum: int) -> None:
        where = f"; resume=True goes on from {self.checkpoint}" if self.checkpoint.exists() else ""
        print(f"stopped by {signal.Signals(signum).name} after step {self.step}{where}", flush=True)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    def _backward(self, loss_function: LossFunction, num_examples: int) -> dict[str, torch.Tensor]:
        """Accumulates the gradient of one global batch; returns the losses' mean over it."""
        micro_batches, total = self.config.gradient_accumulation_steps, {}
        for k in range(micro_batches):
            draw = self._draw(k, num_examples)
            self.wrapped.require_backward_grad_sync = k == micro_batches - 1
            with self.accelerator.autocast():
                losses = loss_function(self.wrapped, draw)
            self.accelerator.backward(losses["loss"] / micro_batches)
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() / micro_batches
        return self.accelerator.reduce(total, "mean") if self.accelerator.num_processes > 1 else total

    def _draw(self, micro_batch: int, num_examples: int) -> Draw:
        size, processes = self.config.batch_size, self.accelerator.num_processes
        start = (micro_batch * processes + self.accelerator.process_index) * size
        return Draw(self.config.seed, self.step, range(start, start + size), self.global_batch_size, num_examples)

    @property
    def global_batch_size(self) -> int:
        """Examples per optimizer step, over all processes and micro-batches."""
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.accelerator.num_processes

    @contextmanager
    def ema_weights(self) -> Iterator[torch.nn.Module]:
        """Lends `model` the EMA weights for the length of a `with` block."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield self.model
        finally:
            self.ema.restore(self.parameters)

    @property
    def checkpoint(self) -> Path:
        return self.output_dir / "checkpoint.pt"

    def save(self) -> None:
        """Writes the state needed for exact resumption, under a temporary name first."""
        if not self.accelerator.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "ema": self.ema.state_dict(), "step": self.step, "fixed": self._fixed()}, part)
        os.replace(part, self.checkpoint)

    def save_models(self, name: str) -> None:
        """Saves the raw weights as folder `name` and the averaged ones as `name`_ema, each a plain diffusers model."""
        save_model(self.model, self.output_dir / name)
        with self.ema_weights() as model:
            save_model(model, self.output_dir / f"{name}_ema")

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.checkpoint.exists():
            print(f"nothing to resume in {self.output_dir.name}: starting from the first step")
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # cut off, not a checkpoint, not readable: torch raises many kinds
            raise ValueError(
                f"{self.checkpoint} cannot be read ({type(error).__name__}): delete it, or start anew with resume=False"
            ) from error
        if state["step"] > self.config.max_train_steps:
            raise ValueError(
                f"{self.checkpoint} stands at step {state['step']}, beyond max_train_steps "
                f"{self.config.max_train_steps}: raise max_train_steps, or start anew with resume=False"
            )
        now = self._fixed()
        changed = {k: (v, now.get(k)) for k, v in state["fixed"].items() if v != now.get(k)}
        if changed:
            raise ValueError(
                f"{self.checkpoint} was written with other settings (then, now): {json.dumps(changed)}. "
                "Use the same settings, or another output_dir, or resume=False."
            )
        self.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(next(self.model.parameters()).device)
        self.step = state["step"]

    def _fixed(self) -> dict[str, object]:
        """What must not change between a run and its resumption; rates and lengths may."""
        names = ("seed", "weight_decay", "max_grad_norm", "adam_beta2", "ema_decay", "mixed_precision")
        settings = {name: getattr(self.config, name) for name in names}
        return {"global_batch_size": self.global_batch_size, **settings, **self.fingerprint}


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only add themselves to the list; a second one acts as it used to."""
    noted, before = [], {}

    def note(signum, frame):
        noted.append(signum)
        signal.signal(signum, before[signum])

    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def save_model(model, folder: Path) -> None:
    """`model.save_pretrained(folder)`, under a temporary name until it is complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
