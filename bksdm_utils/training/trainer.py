"""The trainer, on accelerate, of everything that is trained here (notebooks 00, 03, 05, 06).

Every random choice is a function of (seed, optimizer step, position in the global batch), see `BatchRng`. So a run
that was killed and resumed, or that is spread over two processes, gets the same examples with the same noise.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import EMAModel

from ..config.training import Training, divisors
from ..files import check_disk, folder_lock, write_json
from ..models.saving import save_model, save_weights, trained_state
from .checkpoints import Checkpoints
from .rng import BatchRng
from .step import Step, signals_noted

LossFunction = Callable[[torch.nn.Module, object], dict[str, torch.Tensor]]  # (model, batch) -> losses by name
FIXED = ("seed", "global_batch_size", "weight_decay", "max_grad_norm", "adam_beta2", "ema_decay", "optimizer",
         "mixed_precision")  # fmt: skip


class Trainer:
    """A model, its optimizer, its EMA and the step they have reached.

    The EMA starts as a copy of the model as given. `model` is unwrapped and has the raw weights; within `with
    trainer.ema_weights():` it has the averaged ones.

    Args:
        resume: continue from the newest checkpoint in `output_dir`, if there is one.
        fingerprint: what else must be as it was for a resumption to be the same run: teacher, data, loss weights …
        name: of the model's folders: `name` has raw weights, `name`_ema averaged ones.

    Attributes:
        scores: what the caller last measured; written beside every checkpoint.

    Raises:
        ValueError: the checkpoint cannot be read, is of another run, or is further than `max_train_steps`.
    """

    def __init__(
        self, model: torch.nn.Module, config: Training, output_dir: str | Path, resume: bool = False,
        fingerprint: Mapping[str, object] | None = None, name: str = "model",
    ):  # fmt: skip
        self.config, self.output_dir, self.model, self.name = config, Path(output_dir), model, name
        self.fingerprint = {key: str(value) for key, value in (fingerprint or {}).items()}
        self.checkpoints = Checkpoints(self.output_dir, name, config.checkpoints_kept)
        cpu = next(model.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=cpu, log_with=list(config.trackers) or None,
            project_dir=self.output_dir,
        )  # fmt: skip
        self.micro_batch_size, self.num_micro_batches = config.micro_batches(self.accelerator.num_processes)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = self._new_optimizer()
        averaged = self.parameters if config.ema_decay else []  # without an average it takes no memory
        self.ema = EMAModel(averaged, decay=config.ema_decay, foreach=True)
        self.ema.to(config.ema_device)
        self.step, self.scores, self.tracking = 0, {}, False
        if not cpu:
            torch.cuda.reset_peak_memory_stats()  # this run's peak, not that of one before it in this process
        if resume:
            self._load(optimizer)
        elif self.accelerator.is_main_process:
            self.checkpoints.set_aside()
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        # accelerate wraps forward in autocast for good; `_backward` does so itself, so sampling keeps full precision.
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW
        if self.config.optimizer == "adamw_8bit":
            try:
                from bitsandbytes.optim import AdamW8bit as kind
            except ImportError as error:
                raise ValueError("optimizer='adamw_8bit' needs bitsandbytes: pip install 'bksdm_utils[gpu]', or use "
                                 "'adamw'") from error  # fmt: skip
        betas = (0.9, self.config.adam_beta2)
        return kind(self.parameters, self.config.learning_rate, betas, weight_decay=self.config.weight_decay)

    def steps(self, loss_function: LossFunction, batches) -> Iterator[Step]:
        """Trains, yielding after every optimizer step; the caller owns logging, plots and validation.

        SIGINT and SIGTERM end the training after the step in progress, with a checkpoint where any are kept.

        Args:
            loss_function: (model, batch) -> named losses; "loss" is minimised, the others are only reported.
            batches: `batches(rng)` gives a micro-batch; `num_examples` is the size of the data set, None for a stream.

        Raises:
            ValueError: another run writes to the same folder, or there is too little disk for the checkpoints.
            FloatingPointError: too many consecutive steps had no finite gradient.
        """
        self.model.train()
        self.consecutive_skips = 0
        with folder_lock(self.output_dir), signals_noted() as signals:
            if self.config.checkpoint_steps and self.accelerator.is_main_process:
                more = max(1, self.config.checkpoints_kept + 1 - len(self.checkpoints.all))
                check_disk(self.output_dir, more * self.checkpoint_bytes, "checkpoints")
            while self.step < self.config.max_train_steps:
                yield self._step(loss_function, batches)
                # Only now, when the caller has logged the step, may a checkpoint say that it is done.
                due = self.step % self.config.checkpoint_steps == 0 if self.config.checkpoint_steps else False
                signum = self._agreed(signals)
                if due or (signum and self.config.checkpoint_steps):
                    self._try_to_save()
                if signum:
                    self._stop(signum)

    def _agreed(self, signals: list[int]) -> int:
        """The signal that any of the processes got, 0 for none, so that all stop after the same step."""
        own = torch.tensor([*signals, 0][:1], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())

    def _step(self, loss_function: LossFunction, batches) -> Step:
        """One optimizer step, or none where the gradient is not finite; its random numbers are used up either way."""
        started = time.perf_counter()
        rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self._backward(loss_function, batches)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        norm = float(norm if norm is not None else math.nan)
        finite, scaled = math.isfinite(norm), self.accelerator.scaler is not None
        if finite or scaled:  # fp16's scaler leaves such steps out itself, and must be given them
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite and self.config.ema_decay:
            self._average()
        self.step += 1
        self.consecutive_skips = 0 if finite else self.consecutive_skips + 1
        if self.consecutive_skips > self.config.max_skipped_steps:
            self._abort(norm)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # so that the seconds are those of the step
        seconds = time.perf_counter() - started
        return Step(self.step, losses, norm, not finite, rate, seconds, self.config.global_batch_size / seconds)

    def _average(self) -> None:
        device = self.config.ema_device
        self.ema.step([p.to(device) for p in self.parameters] if device else self.parameters)

    def _abort(self, norm: float) -> None:
        newest = self.checkpoints.newest
        last = f"the last checkpoint is {newest}" if newest else "there is no checkpoint"
        raise FloatingPointError(f"{self.consecutive_skips} consecutive steps up to step {self.step} had no finite "
                                 f"gradient (norm {norm}): the model is as before them, {last}. Lower the learning "
                                 "rate, or use bf16 or no mixed precision.")  # fmt: skip

    def _stop(self, signum: int) -> None:
        newest = self.checkpoints.newest
        advice = f"; resume=True continues from {newest}" if newest else ""
        print(f"stopped by {signal.Signals(signum).name} after step {self.step}{advice}", flush=True)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    def _backward(self, loss_function: LossFunction, batches) -> dict[str, torch.Tensor]:
        """Accumulates the gradient of one global batch; returns the losses' mean over it."""
        total = {}
        for k in range(self.num_micro_batches):
            batch = batches(self._rng(k, batches.num_examples))
            self.wrapped.require_backward_grad_sync = k == self.num_micro_batches - 1
            with self.accelerator.autocast():
                losses = loss_function(self.wrapped, batch)
            self.accelerator.backward(losses["loss"] / self.num_micro_batches)
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() / self.num_micro_batches
        return self.accelerator.reduce(total, "mean")

    def _rng(self, micro_batch: int, num_examples: int | None) -> BatchRng:
        size, config = self.micro_batch_size, self.config
        start = (micro_batch * self.accelerator.num_processes + self.accelerator.process_index) * size
        return BatchRng(config.seed, self.step, range(start, start + size), config.global_batch_size, num_examples)

    def find_micro_batch(self, loss_function: LossFunction, batches) -> dict[int, float]:
        """Measures micro-batches by dry runs and takes the fastest that fits; the global batch stays as it is.

        Nothing is trained: gradients are discarded, no step is counted. Memory that the optimizer will need is left
        free. The search ends with the first size that does not fit, or the second in succession that is no faster.

        Returns:
            images a second, by size.
        """
        share, rates, slower = self.config.global_batch_size // self.accelerator.num_processes, {}, 0
        for size in divisors(share):
            try:
                rate = self._dry_run(loss_function, batches, size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                break
            if not self._fits():
                break
            slower = slower + 1 if rate < 1.02 * max(rates.values(), default=0) else 0
            rates[size] = round(rate, 2)
            if slower == 2:
                break
        sizes = gather_object([max(rates, key=rates.get, default=1)])
        self.micro_batch_size, self.num_micro_batches = min(sizes), share // min(sizes)  # what fits all processes
        return rates

    def _dry_run(self, loss_function: LossFunction, batches, size: int) -> float:
        rng = BatchRng(self.config.seed, self.step, range(size), self.config.global_batch_size, batches.num_examples)
        on_gpu = self.accelerator.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(2):  # the first pass warms up
                started = time.perf_counter()
                with self.accelerator.autocast():
                    loss_function(self.model, batches(rng))["loss"].backward()
                if on_gpu:
                    torch.cuda.synchronize()
            return size / (time.perf_counter() - started)
        finally:
            self.model.zero_grad()  # also after a pass that ran out of memory

    def _fits(self) -> bool:
        """Whether the optimizer's state would still fit on the GPU, with a tenth to spare."""
        if self.accelerator.device.type != "cuda":
            return True
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()  # another program's, this notebook's kernel for one
        return torch.cuda.max_memory_allocated() + self.training_bytes()["optimizer"] < 0.9 * (total - others)

    def training_bytes(self) -> dict[str, int]:
        """Bytes that training needs whatever the batch: weights, gradients, optimizer, ema."""
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
            settings = self.config.values() | self.fingerprint
            self.accelerator.init_trackers("bksdm", {name: str(value) for name, value in settings.items()})
            self.tracking = True
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=self.step)

    def finish_tracking(self) -> None:
        """Flushes the trackers."""
        for tracker in self.accelerator.trackers if self.tracking else ():
            tracker.finish()
        self.tracking = False

    @contextmanager
    def ema_weights(self) -> Iterator[torch.nn.Module]:
        """Within the block `model` has the averaged weights; its own where there is no average."""
        if not self.config.ema_decay:
            yield self.model
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield self.model
        finally:
            self.ema.restore(self.parameters)

    def save(self) -> None:
        """Writes a checkpoint, completely or not at all."""
        if self.accelerator.is_main_process:
            self.checkpoints.write(self.step, self._write)

    def _try_to_save(self) -> None:
        """A disk that is full for a while costs a checkpoint, not the run."""
        try:
            self.save()
        except OSError as error:
            print(f"warning: {error}. Make room: the next one is tried in time", flush=True)
        self.accelerator.wait_for_everyone()  # where one process ends, its launcher would kill the one that writes

    def _write(self, folder: Path) -> None:
        save_weights(self.model, folder / self.name)
        if self.config.ema_decay:
            with self.ema_weights() as model:
                save_weights(model, folder / f"{self.name}_ema")
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None  # fp16's
        torch.save({"optimizer": self.optimizer.state_dict(), "scaler": scaler}, folder / "optimizer.pt")
        info = {"step": self.step, "ema_steps": self.ema.optimization_step, "scores": self.scores}
        write_json(folder / "step.json", {**info, "fixed": self._fixed()})

    def save_models(self) -> None:
        """Saves the raw weights as folder `name` and the averaged ones as `name`_ema, each a plain diffusers model."""
        save_model(self.model, self.output_dir / self.name)
        with self.ema_weights() as model:
            save_model(model, self.output_dir / f"{self.name}_ema")

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        folder = self.checkpoints.newest
        if folder is None:
            print(f"nothing to resume in {self.output_dir.name}: starting from the first step")
            return
        saved = self.checkpoints.read(folder, bool(self.config.ema_decay), self._fixed(), self.config.max_train_steps)
        keys = self.model.load_state_dict(saved.weights, strict=False)
        missing = set(keys.missing_keys) & set(trained_state(self.model))
        if missing or keys.unexpected_keys:
            raise ValueError(f"{folder} is of another model: it lacks {sorted(missing)[:3]}, it has "
                             f"{keys.unexpected_keys[:3]} more. Use another output_dir, or resume=False")  # fmt: skip
        optimizer.load_state_dict(saved.state["optimizer"])
        if saved.state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad] if saved.averaged else []
        for shadow, name in zip(self.ema.shadow_params, trained, strict=True):
            shadow.data.copy_(saved.averaged[name])
        self.ema.optimization_step, self.step = saved.info["ema_steps"], saved.info["step"]
        self.scores = saved.info["scores"]

    def _fixed(self) -> dict[str, object]:
        """What must not change between a run and its resumption; rates and lengths may."""
        return {name: getattr(self.config, name) for name in FIXED} | self.fingerprint
