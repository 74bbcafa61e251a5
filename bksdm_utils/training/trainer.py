"""The trainer, on accelerate, of everything that is trained here (notebooks 00, 03, 05, 06).

Every random choice is a function of (seed, optimizer step, position in the global batch), see `BatchRng`. So a run
that was killed and resumed, or that is spread over two processes, gets the same examples with the same noise.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..config.training import Training
from ..files import check_disk, folder_lock, write_json
from ..models.devices import DTYPES, memory_advice
from ..models.saving import save_model, save_weights, trained_state
from .checkpoints import Checkpoints
from .ema import Average
from .rng import BatchRng
from .step import Step, signals_noted

LossFunction = Callable[[torch.nn.Module, object], dict[str, torch.Tensor]]  # (model, batch) -> losses by name
FIXED = ("seed", "global_batch_size", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon",
         "ema_decay", "optimizer", "mixed_precision", "lr_schedule", "lr_warmup_steps", "lr_decay_start",
         "lr_num_cycles", "lr_power", "scale_lr")  # fmt: skip


class Trainer:
    """A model, its optimizer, its EMA and the step they have reached.

    The EMA starts as a copy of the model as given. `model` is unwrapped and has the raw weights; within `with
    trainer.ema_weights():` it has the averaged ones.

    Args:
        resume: continue from `config.checkpoint`, or the newest one in `output_dir`, if there is one.
        fingerprint: what else must be as it was for a resumption to be the same run: teacher, data, loss weights …
        name: of the model's folders: `name` has raw weights, `name`_ema averaged ones.
        rates: beginning of parameters' names -> factor of their learning rate; 1 for all others.

    Attributes:
        scores: what the caller last measured; written beside every checkpoint.

    Raises:
        ValueError: the checkpoint cannot be read, is of another run, or is further than `max_train_steps`.
    """

    def __init__(
        self, model: torch.nn.Module, config: Training, output_dir: str | Path, resume: bool = False,
        fingerprint: Mapping[str, object] | None = None, name: str = "model", rates: Mapping[str, float] | None = None,
    ):  # fmt: skip
        self.config, self.output_dir, self.model, self.name = config, Path(output_dir), model, name
        self.fingerprint = {key: str(value) for key, value in (fingerprint or {}).items()}
        self.checkpoints = Checkpoints(self.output_dir, name, config.checkpoints_kept)
        device = next(model.parameters()).device
        # accelerate's precision holds for a whole process; ours is the trainer's own, so that runs may differ in it.
        self.accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu",
                                       log_with=list(config.trackers) or None, project_dir=self.output_dir)  # fmt: skip
        self.dtype = DTYPES[config.mixed_precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.micro_batch_size, self.num_micro_batches = config.micro_batches(self.accelerator.num_processes)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = self._new_optimizer(rates or {})
        averaged = self.parameters if config.ema_decay else []  # without an average it takes no memory
        self.ema = Average(averaged, config.ema_decay, config.ema_device)
        self.step, self.scores, self.tracking = 0, {}, False
        self.drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
        if self.on_gpu:
            torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
            torch.cuda.reset_peak_memory_stats()  # this run's peak, not that of one before it in this process
        if resume:
            self._load(optimizer)
        elif self.accelerator.is_main_process:
            self.checkpoints.set_aside()
        self.wrapped, self.optimizer = self.accelerator.prepare(model), optimizer

    @property
    def on_gpu(self) -> bool:
        return self.accelerator.device.type == "cuda"

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in the run's precision."""
        return torch.autocast(self.accelerator.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def _new_optimizer(self, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        kind, options = torch.optim.AdamW, {"fused": True} if self.on_gpu else {}
        if self.config.optimizer == "adamw_8bit":
            try:
                from bitsandbytes.optim import AdamW8bit as kind

                options = {}
            except ImportError as error:
                raise ValueError("optimizer='adamw_8bit' needs bitsandbytes: pip install 'bksdm_utils[gpu]', or use "
                                 "'adamw'") from error  # fmt: skip
        config, groups = self.config, {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                factor = next((factor for start, factor in rates.items() if name.startswith(start)), 1.0)
                groups.setdefault(factor, []).append(p)
        return kind([{"params": group, "factor": factor} for factor, group in groups.items()], config.learning_rate,
                    (config.adam_beta1, config.adam_beta2), config.adam_epsilon, config.weight_decay,
                    **options)  # fmt: skip

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
        micro_batches = self._micro_batches(batches)
        with folder_lock(self.output_dir), signals_noted() as signals:
            if self.config.checkpoint_steps and self.accelerator.is_main_process:
                check_disk(self.output_dir, self._checkpoints_to_come() * self.checkpoint_bytes, "checkpoints")
            while self.step < self.config.max_train_steps:
                with memory_advice(f"training on micro-batches of {self.micro_batch_size}"):
                    step = self._step(loss_function, micro_batches)
                yield step
                # Only now, when the caller has logged the step, may a checkpoint say that it is done.
                due = self.step % self.config.checkpoint_steps == 0 if self.config.checkpoint_steps else False
                signum = self._agreed(signals)
                if due or (signum and self.config.checkpoint_steps):
                    self._try_to_save()
                if signum:
                    self._stop(signum)

    def _checkpoints_to_come(self) -> int:
        """How many more the disk must hold at once."""
        config = self.config
        if not config.checkpoints_kept:
            return -(-(config.max_train_steps - self.step) // config.checkpoint_steps)
        return max(1, config.checkpoints_kept + 1 - len(self.checkpoints.all))

    def _agreed(self, signals: list[int]) -> int:
        """The signal that any of the processes got, 0 for none, so that all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return signals[0] if signals else 0
        own = torch.tensor([*signals, 0][:1], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())

    def _micro_batches(self, batches) -> Iterator:
        """Every micro-batch from here to the end; on a GPU a thread makes the next one while the GPU computes."""
        rngs = (self._rng(step, k, batches.num_examples) for step in range(self.step, self.config.max_train_steps)
                for k in range(self.num_micro_batches))  # fmt: skip
        if not self.on_gpu:
            yield from map(batches, rngs)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(batches, next(rngs)) if self.step < self.config.max_train_steps else None
            while ahead:
                batch, rng = ahead.result(), next(rngs, None)
                ahead = pool.submit(batches, rng) if rng else None
                yield batch

    def _step(self, loss_function: LossFunction, micro_batches: Iterator) -> Step:
        """One optimizer step, or none where the gradient is not finite; its random numbers are used up either way."""
        started = time.perf_counter()
        rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)  # a checkpoint of an earlier version has none
        losses = self._backward(loss_function, micro_batches)
        self.scaler.unscale_(self.optimizer)
        losses["norm"] = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        # The only time that the host waits for a GPU; so `seconds` has the optimizer's share of the step before.
        values = dict(zip(losses, torch.stack([v.float() for v in losses.values()]).tolist(), strict=True))
        norm = values.pop("norm")
        finite = math.isfinite(norm)
        if finite or self.scaler.is_enabled():  # fp16's scaler leaves such steps out itself, and must be given them
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if finite and self.config.ema_decay:
            self.ema.step(self.parameters, flush=self.step == self.config.max_train_steps)
        self.consecutive_skips = 0 if finite else self.consecutive_skips + 1
        if self.consecutive_skips > self.config.max_skipped_steps:
            self._abort(norm)
        seconds = time.perf_counter() - started
        return Step(self.step, values, norm, not finite, rate, seconds, self.config.global_batch_size / seconds)

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

    def _backward(self, loss_function: LossFunction, micro_batches: Iterator) -> dict[str, torch.Tensor]:
        """Accumulates the gradient of one global batch; returns the losses' mean over it."""
        total = {}
        for k in range(self.num_micro_batches):
            batch = next(micro_batches)
            if self.drops:  # a resumed run drops what it would have dropped
                torch.manual_seed(self._rng(self.step, k, None).batch_seed)
            self.wrapped.require_backward_grad_sync = k == self.num_micro_batches - 1
            with self.autocast():
                losses = loss_function(self.wrapped, batch)
            self.scaler.scale(losses["loss"] / self.num_micro_batches).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() / self.num_micro_batches
        return self.accelerator.reduce(total, "mean")

    def _rng(self, step: int, micro_batch: int, num_examples: int | None) -> BatchRng:
        size, config = self.micro_batch_size, self.config
        start = (micro_batch * self.accelerator.num_processes + self.accelerator.process_index) * size
        return BatchRng(config.seed, step, range(start, start + size), config.global_batch_size, num_examples)

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
        self._init_trackers()
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=self.step)

    def track_images(self, grid: Image.Image) -> None:
        """Gives an image of the validation to the trackers, under the present step."""
        self._init_trackers()
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=self.step, **layout)

    def _init_trackers(self) -> None:
        if not self.tracking:
            settings = self.config.values() | self.fingerprint
            self.accelerator.init_trackers("bksdm", {name: str(value) for name, value in settings.items()})
            self.tracking = True

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
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save(state, folder / "optimizer.pt")
        info = {"step": self.step, "ema_steps": self.ema.optimization_step, "ema_behind": self.ema.behind,
                "scores": self.scores}  # fmt: skip
        write_json(folder / "step.json", {**info, "fixed": fixed_settings(self.config) | self.fingerprint})

    def save_models(self) -> None:
        """Saves the raw weights as `name` and the averaged ones, if any, as `name`_ema: plain diffusers folders."""
        save_model(self.model, self.output_dir / self.name)
        averaged = self.output_dir / f"{self.name}_ema"
        if not self.config.ema_decay:
            shutil.rmtree(averaged, ignore_errors=True)  # of an earlier run
            return
        with self.ema_weights() as model:
            save_model(model, averaged)

    @property
    def result(self) -> Path:
        """The folder of `save_models` whose weights validation uses: the averaged ones, where there are any."""
        return self.output_dir / (f"{self.name}_ema" if self.config.ema_decay else self.name)

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        folder = self.checkpoints.find(self.config.checkpoint)
        if folder is None:
            print(f"nothing to resume in {self.output_dir.name}: starting from the first step")
            return
        fixed = fixed_settings(self.config) | self.fingerprint
        saved = self.checkpoints.read(folder, bool(self.config.ema_decay), fixed, self.config.max_train_steps)
        keys = self.model.load_state_dict(saved.weights, strict=False)
        missing = set(keys.missing_keys) & set(trained_state(self.model))
        if missing or keys.unexpected_keys:
            raise ValueError(f"{folder} is of another model: it lacks {sorted(missing)[:3]}, it has "
                             f"{keys.unexpected_keys[:3]} more. Use another output_dir, or resume=False")  # fmt: skip
        optimizer.load_state_dict(saved.state["optimizer"])
        if saved.state["scaler"]:
            self.scaler.load_state_dict(saved.state["scaler"])
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad] if saved.averaged else []
        for shadow, name in zip(self.ema.shadow_params, trained, strict=True):
            shadow.data.copy_(saved.averaged[name])
        self.ema.optimization_step, self.ema.behind = saved.info["ema_steps"], saved.info["ema_behind"]
        self.step, self.scores = saved.info["step"], saved.info["scores"]
        if self.accelerator.is_main_process:
            self.checkpoints.set_aside(folder)


def fixed_settings(config: Training) -> dict[str, object]:
    """What must not change between a run and its resumption; the highest rate and the length may."""
    return {name: getattr(config, name) for name in FIXED}
