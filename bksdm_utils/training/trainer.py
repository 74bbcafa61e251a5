"""The one trainer, on accelerate: everything that is trained here is trained through `Trainer`."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from ..config.training import TrainingConfig, divisors
from ..files import check_disk, folder_lock, write_json
from ..models.saving import load_weights, save_model, save_weights, trained_state
from .rng import BatchRng


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports: number (from 1), losses (detached, still on the device), the gradient's norm
    before clipping, whether the step was left out for want of a finite gradient, rate, seconds, examples a second."""

    step: int
    losses: dict[str, torch.Tensor]
    gradient_norm: float
    skipped: bool
    learning_rate: float
    seconds: float
    images_per_second: float

    def floats(self) -> dict[str, float]:
        """Everything as plain numbers, and the memory in use in GB; this is where the losses leave the device."""
        values = torch.stack([torch.as_tensor(value).float() for value in self.losses.values()]).tolist()
        own = {"gradient_norm": self.gradient_norm, "skipped": float(self.skipped), "learning_rate": self.learning_rate}
        pace = {"seconds": round(self.seconds, 3), "images_per_second": round(self.images_per_second, 2)}
        return {"step": self.step, **dict(zip(self.losses, values, strict=True)), **own, **pace, "memory_gb": memory()}


def memory() -> float:
    """GB in use: the most so far on a GPU, at present on the CPU."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return round(used / 1e9, 3)


def shared_work(count: int, device: torch.device | str = "cpu") -> Iterator[int]:
    """This process's share of range(count); at its end it waits for the others."""
    state = PartialState(cpu=torch.device(device).type == "cpu")
    yield from range(state.process_index, count, state.num_processes)
    state.wait_for_everyone()


def over_processes(function: Callable[[list[int]], torch.Tensor], count: int, device: str = "cpu") -> torch.Tensor:
    """`function(range(count))`, each process computing its share of the rows; all get the whole."""
    with PartialState(cpu=device == "cpu").split_between_processes(list(range(count))) as share:
        return gather(function(share))


LossFunction = Callable[[torch.nn.Module, BatchRng], dict[str, torch.Tensor]]


class Trainer:
    """A model, its optimizer, its EMA and the step they stand at.

    The EMA starts as a copy of the model as given. `model` is unwrapped and holds the raw weights; `with
    trainer.ema_weights():` lends it the averaged ones.

    Args:
        resume: go on from the newest checkpoint in `output_dir`, if there is one.
        fingerprint: what else must be as it was for a resumption to be the same run: teacher, data, loss weights …
        name: what the model's folders are called: `name` holds raw weights, `name`_ema averaged ones.

    Attributes:
        scores: what the caller last measured; written beside every checkpoint.

    Raises:
        ValueError: the checkpoint cannot be read, is of another run, or is further than `max_train_steps`; or there is
            too little disk for the checkpoints.
    """

    def __init__(
        self, model: torch.nn.Module, config: TrainingConfig, output_dir: str | Path, resume: bool = False,
        fingerprint: Mapping[str, object] | None = None, name: str = "model",
    ):  # fmt: skip
        self.config, self.output_dir, self.model, self.name = config, Path(output_dir), model, name
        self.fingerprint = {key: str(value) for key, value in (fingerprint or {}).items()}
        cpu = next(model.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=cpu, log_with=list(config.trackers) or None,
            project_dir=self.output_dir,
        )  # fmt: skip
        self.micro_batch_size, self.num_micro_batches = config.micro_batches(self.accelerator.num_processes)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = self._new_optimizer()
        averaged = self.parameters if config.ema_decay else []  # without an average not a byte for one
        self.ema = EMAModel(averaged, decay=config.ema_decay, foreach=True)
        self.ema.to(config.ema_device)
        self.step, self.scores, self.tracking = 0, {}, False
        if not cpu:
            torch.cuda.reset_peak_memory_stats()  # this run's peak, not that of one before it in this process
        if resume:
            self._load(optimizer)
        elif self.accelerator.is_main_process:
            self._set_old_checkpoints_aside()
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        # accelerate wraps forward in autocast for good; `_backward` does so itself, so drawing stays in full precision.
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW
        if self.config.optimizer == "adamw_8bit":
            try:
                from bitsandbytes.optim import AdamW8bit as kind
            except ImportError as error:
                raise ValueError(
                    "optimizer='adamw_8bit' needs bitsandbytes: pip install 'bksdm_utils[gpu]', or use 'adamw'"
                ) from error
        betas = (0.9, self.config.adam_beta2)
        return kind(self.parameters, self.config.learning_rate, betas, weight_decay=self.config.weight_decay)

    def steps(self, loss_function: LossFunction, num_examples: int | None) -> Iterator[Step]:
        """Trains, yielding after every optimizer step; the caller owns logging, plots and validation.

        SIGINT and SIGTERM end the training after the step in progress, with a checkpoint where any are kept.

        Args:
            loss_function: (model, draw) -> named losses; "loss" is what is minimised, the others are only reported.
            num_examples: size of the data set that `draw.indices` points into; None for a stream.

        Raises:
            ValueError: another run writes to the same folder, or there is too little disk for the checkpoints.
            FloatingPointError: too many steps in a row had no finite gradient.
        """
        self.model.train()
        self.skipped_in_a_row = 0
        with folder_lock(self.output_dir), _signals_noted() as signals:
            if self.config.checkpoint_steps and self.accelerator.is_main_process:
                there = len(list(self.output_dir.glob("checkpoints/step_*[0-9]")))
                more = max(1, self.config.checkpoints_kept + 1 - there)
                check_disk(self.output_dir, more * self.checkpoint_bytes, "checkpoints")
            while self.step < self.config.max_train_steps:
                yield self._step(loss_function, num_examples)
                # Only now, when the caller has logged the step, may a checkpoint say that it is done.
                due = self.step % self.config.checkpoint_steps == 0 if self.config.checkpoint_steps else False
                signum = self._agreed(signals)
                if due or (signum and self.config.checkpoint_steps):
                    self._try_to_save()
                if signum:
                    self._stop(signum)

    def finish_tracking(self) -> None:
        """Has the trackers write what they still hold."""
        for tracker in self.accelerator.trackers if self.tracking else ():
            tracker.finish()
        self.tracking = False

    def _agreed(self, signals: list[int]) -> int:
        """The signal that any of the processes got, 0 for none, so that all stop after the same step."""
        own = signals[0] if signals else 0
        if self.accelerator.num_processes == 1:
            return own
        return int(self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max())

    def _step(self, loss_function: LossFunction, num_examples: int | None) -> Step:
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
        if finite and self.config.ema_decay:
            self._average()
        self.step += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            self._give_up(norm)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # so that the seconds are those of the step
        seconds = time.perf_counter() - started
        return Step(self.step, losses, norm, not finite, rate, seconds, self.config.global_batch_size / seconds)

    def _average(self) -> None:
        where = self.config.ema_device
        self.ema.step([p.to(where) for p in self.parameters] if where else self.parameters)

    def _give_up(self, norm: float) -> None:
        good = f"the last good state is {self.checkpoint}" if self.checkpoint else "there is no checkpoint"
        raise FloatingPointError(
            f"{self.skipped_in_a_row} steps in a row up to step {self.step} had no finite gradient (norm {norm}): the "
            f"model is as it was before them, {good}. Lower the learning rate, or use bf16 or no mixed precision."
        )

    def _stop(self, signum: int) -> None:
        where = f"; resume=True goes on from {self.checkpoint}" if self.checkpoint else ""
        print(f"stopped by {signal.Signals(signum).name} after step {self.step}{where}", flush=True)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    def _backward(self, loss_function: LossFunction, num_examples: int | None) -> dict[str, torch.Tensor]:
        """Accumulates the gradient of one global batch; returns the losses' mean over it."""
        total = {}
        for k in range(self.num_micro_batches):
            draw = self._draw(k, num_examples)
            self.wrapped.require_backward_grad_sync = k == self.num_micro_batches - 1
            with self.accelerator.autocast():
                losses = loss_function(self.wrapped, draw)
            self.accelerator.backward(losses["loss"] / self.num_micro_batches)
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() / self.num_micro_batches
        return self.accelerator.reduce(total, "mean") if self.accelerator.num_processes > 1 else total

    def _draw(self, micro_batch: int, num_examples: int | None) -> BatchRng:
        size, processes = self.micro_batch_size, self.accelerator.num_processes
        start = (micro_batch * processes + self.accelerator.process_index) * size
        global_batch_size = self.config.global_batch_size
        return BatchRng(self.config.seed, self.step, range(start, start + size), global_batch_size, num_examples)

    def find_micro_batch(self, loss_function: LossFunction, num_examples: int | None) -> dict[int, float]:
        """Measures micro-batches by dry runs and takes the fastest that fits; the global batch stays as it is.

        Nothing is learned: gradients are thrown away, no step is counted. Memory that the optimizer will need is left
        free. The search ends with the first size that does not fit, or the second in a row that is no faster.

        Returns:
            images a second, by size.
        """
        share, rates, worse = self.config.global_batch_size // self.accelerator.num_processes, {}, 0
        for size in divisors(share):
            try:
                rate = self._dry_run(loss_function, num_examples, size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                break
            if not self._fits():
                break
            worse = worse + 1 if rate < 1.02 * max(rates.values(), default=0) else 0
            rates[size] = round(rate, 2)
            if worse == 2:
                break
        found = gather_object([max(rates, key=rates.get, default=1)])
        self.micro_batch_size, self.num_micro_batches = min(found), share // min(found)  # what fits all processes
        return rates

    def _dry_run(self, loss_function: LossFunction, num_examples: int | None, size: int) -> float:
        draw = BatchRng(self.config.seed, self.step, range(size), self.config.global_batch_size, num_examples)
        on_gpu = self.accelerator.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(2):  # the first pass warms up
                started = time.perf_counter()
                with self.accelerator.autocast():
                    loss_function(self.model, draw)["loss"].backward()
                if on_gpu:
                    torch.cuda.synchronize()
            return size / (time.perf_counter() - started)
        finally:
            self.model.zero_grad()  # also of a pass that found no memory: nothing of it may be learned

    def _fits(self) -> bool:
        """Whether the optimizer's state would still find room on the GPU, with a tenth to spare."""
        if self.accelerator.device.type != "cuda":
            return True
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()  # another program's, this notebook's kernel for one
        return torch.cuda.max_memory_allocated() + self.training_bytes()["optimizer"] < 0.9 * (total - others)

    def training_bytes(self) -> dict[str, int]:
        """Bytes that training holds whatever the batch: weights, gradients, optimizer, ema."""
        trained = sum(p.numel() * p.element_size() for p in self.parameters)
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        optimizer = trained // 2 if self.config.optimizer == "adamw_8bit" else 2 * trained
        averaged = trained if self.config.ema_decay else 0
        return {"weights": weights, "gradients": trained, "optimizer": optimizer, "ema": averaged}

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: raw weights, averaged weights if any, the optimizer's state."""
        weights = sum(t.numel() * t.element_size() for t in trained_state(self.model).values())
        return (2 if self.config.ema_decay else 1) * weights + self.training_bytes()["optimizer"]

    def track(self, values: Mapping[str, float]) -> None:
        """Gives values to the trackers, under the present step."""
        if not self.tracking:
            about = asdict(self.config) | self.fingerprint
            self.accelerator.init_trackers("bksdm", {name: str(value) for name, value in about.items()})
            self.tracking = True
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=self.step)

    @contextmanager
    def ema_weights(self) -> Iterator[torch.nn.Module]:
        """Lends `model` the EMA weights for the length of a `with` block; its own where there is no average."""
        if not self.config.ema_decay:
            yield self.model
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield self.model
        finally:
            self.ema.restore(self.parameters)

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint: a folder with the model, its average, the optimizer's state and step.json."""
        return max((self.output_dir / "checkpoints").glob("step_*[0-9]"), default=None)

    def save(self) -> None:
        """Writes a checkpoint, whole or not at all, and removes those that are too old to be kept.

        Raises:
            OSError: it could not be written; earlier ones are untouched.
        """
        folder = self.output_dir / "checkpoints"
        part, target = folder / "part", folder / f"step_{self.step:08}"
        if target.exists() or not self.accelerator.is_main_process:
            return
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            self._write(part)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk so
            shutil.rmtree(part, ignore_errors=True)
            kept = f"{self.checkpoint} is untouched" if self.checkpoint else "there is no earlier one"
            raise OSError(f"the checkpoint of step {self.step} could not be written ({error}); {kept}") from error
        os.replace(part, target)
        for old in sorted(folder.glob("step_*[0-9]"))[: -self.config.checkpoints_kept]:
            shutil.rmtree(old, ignore_errors=True)

    def _try_to_save(self) -> None:
        """A disk that is full for a while costs a checkpoint, not the run."""
        try:
            self.save()
        except OSError as error:
            print(f"warning: {error}. Make room: the next one is tried in time", flush=True)
        self.accelerator.wait_for_everyone()  # a process that ends would have its launcher kill the one that writes

    def _write(self, folder: Path) -> None:
        save_weights(self.model, folder / self.name)
        if self.config.ema_decay:
            with self.ema_weights() as model:
                save_weights(model, folder / f"{self.name}_ema")
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None  # fp16's
        torch.save({"optimizer": self.optimizer.state_dict(), "scaler": scaler}, folder / "optimizer.pt")
        about = {"step": self.step, "ema_steps": self.ema.optimization_step, "scores": self.scores}
        write_json(folder / "step.json", {**about, "fixed": self._fixed()})

    def save_models(self) -> None:
        """Saves the raw weights as folder `name` and the averaged ones as `name`_ema, each a plain diffusers model."""
        save_model(self.model, self.output_dir / self.name)
        with self.ema_weights() as model:
            save_model(model, self.output_dir / f"{self.name}_ema")

    def _set_old_checkpoints_aside(self) -> None:
        """A later resume must not go on from an older run; one that was started anew by mistake can be had back."""
        folder, old = self.output_dir / "checkpoints", self.output_dir / "checkpoints.old"
        if self.checkpoint:
            with folder_lock(self.output_dir):  # never those of a run at work
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            print(f"the checkpoints of an earlier run were set aside as {old.name}")

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        folder = self.checkpoint
        if folder is None:
            print(f"nothing to resume in {self.output_dir.name}: starting from the first step")
            return
        try:
            about = json.loads((folder / "step.json").read_text(encoding="utf-8"))
            weights = load_weights(folder / self.name)
            averaged = load_weights(folder / f"{self.name}_ema") if self.config.ema_decay else {}
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # cut off, not a checkpoint, not readable: each library raises its own kinds
            raise ValueError(
                f"{folder} cannot be read ({type(error).__name__}): delete it to go on from the one before "
                "it, or start anew with resume=False"
            ) from error
        self._check_same_run(folder, about)
        lost = self.model.load_state_dict(weights, strict=False)
        absent = set(lost.missing_keys) & set(trained_state(self.model))
        if absent or lost.unexpected_keys:
            raise ValueError(f"{folder} is of another model: it lacks {sorted(absent)[:3]}, it has "
                             f"{lost.unexpected_keys[:3]} more. Use another output_dir, or resume=False")  # fmt: skip
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        for shadow, name in zip(self.ema.shadow_params, trained if averaged else [], strict=True):
            shadow.data.copy_(averaged[name])
        self.ema.optimization_step, self.step, self.scores = about["ema_steps"], about["step"], about["scores"]

    def _check_same_run(self, folder: Path, about: Mapping) -> None:
        now, limit = self._fixed(), self.config.max_train_steps
        changed = {k: (v, now.get(k)) for k, v in about["fixed"].items() if v != now.get(k)}
        if changed:
            raise ValueError(
                f"{folder} was written with other settings (then, now): {json.dumps(changed)}. "
                "Use the same settings, or another output_dir, or resume=False."
            )
        if about["step"] > limit:
            raise ValueError(
                f"{folder} stands at step {about['step']}, beyond max_train_steps {limit}: raise max_train_steps, or "
                "start anew with resume=False"
            )

    def _fixed(self) -> dict[str, object]:
        """What must not change between a run and its resumption; rates and lengths may."""
        names = ("seed", "global_batch_size", "weight_decay", "max_grad_norm", "adam_beta2", "ema_decay", "optimizer",
                 "mixed_precision")  # fmt: skip
        return {name: getattr(self.config, name) for name in names} | self.fingerprint


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only add themselves to the list; a second SIGINT acts as it used to.

    SIGTERM may come twice, from whoever asks and from a launcher that passes it on to all of its processes.
    """
    noted, before = [], {}

    def note(signum, frame):
        noted.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, before[signum])

    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
