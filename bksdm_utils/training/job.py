"""A distillation run from its parameters to a trained student (notebook 03)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from ..config.presets import Preset
from ..config.training import TrainingConfig
from ..core.families import TextConditioning
from ..core.losses import Distillation, LossWeights
from ..core.plans import RemovalPlan
from ..core.surgery import build_student
from ..core.taps import tap_pairs
from ..evaluation.scorer import Scorer
from ..files import CsvLog, folder_lock, read_log, write_json
from ..models.pipelines import Pipeline, load_pipeline, with_unet
from ..processes import LAST_WORDS, follow, launch, mark_finished, running
from ..workbook.parameters import find_notebook, literal
from ..workbook.run import configure, requested_plan
from .batches import Augmentation
from .latents import LatentDataset, load_data
from .streams import StreamedDataset
from .trainer import Step, Trainer

LOGS = ("log.csv", "validation.csv")


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Training:
    """Teacher, student and data of one run; `begin` adds the trainer, `steps` is the loop.

    Attributes:
        parameters: of notebook 03, by name.
        settings: the preset with those parameters in place.
        pairs: (teacher module, student module) whose outputs are compared.
    """

    parameters: Mapping[str, object]
    settings: Preset
    plan: RemovalPlan
    dir: Path
    pipe: Pipeline
    student: UNet2DConditionModel
    data: LatentDataset | StreamedDataset
    condition: TextConditioning
    noise_schedule: DDPMScheduler
    pairs: list[tuple[str, str]]
    scorer: Scorer
    trainer: Trainer | None = None
    log: CsvLog | None = field(default=None, repr=False)
    validation: CsvLog | None = field(default=None, repr=False)

    def begin(self, resume: bool) -> None:
        """Makes losses, optimizer, EMA and logs; with `resume` they go on from the newest checkpoint.

        Raises:
            ValueError: another training is at work in the folder; nothing there is touched then. Or this student has
                learned already, and is asked to start anew.
        """
        if self.trainer and self.trainer.step and not resume:
            raise ValueError("the student has learned already: `prepare` gives a fresh one, resume=True goes on")
        self.distillation = self.distil(self.student, self.parameters, self.settings)
        config = training_config(self.parameters, self.settings, self.pipe.device.type)
        with folder_lock(self.dir):
            self.trainer = Trainer(self.student, config, self.dir, resume, self._same_run(), name="unet")
            self.log, self.validation = (CsvLog(self.dir / name, self.trainer.step) for name in LOGS)
        if self.parameters["find_batch_size"]:
            rates = self.trainer.find_micro_batch(self.distillation.losses, self.data.num_examples)
            print(f"images/s by micro-batch {rates}: takes {self.trainer.micro_batch_size}")

    def progress(self, num_processes: int | None = None) -> Iterator[tuple[list[dict], list[dict]]]:
        """Trains, here or in `num_processes` processes of their own; yields the rows of log and validation so far.

        Those processes outlive this one: called again, also by another kernel, this watches them.
        """
        if num_processes is None:
            self.begin(self.parameters["resume"])
            for _ in self.steps():
                yield self.log.rows, self.validation.rows
            return
        if not (self.parameters["resume"] or running(self.dir)):
            with folder_lock(self.dir):
                for name in LOGS:  # an older run's, which would be taken for this one's until its first step
                    (self.dir / name).unlink(missing_ok=True)
        launch(self.dir, num_processes)
        for _ in follow(self.dir):
            yield tuple(read_log(self.dir / name) for name in LOGS)
        self.begin(resume=True)

    def distil(self, student: UNet2DConditionModel, parameters: Mapping, settings: Preset) -> Distillation:
        """What `student` is to minimise with these parameters, by this run's teacher and data."""
        taps = tap_pairs(self.plan, self.pipe.unet.config, parameters["kd"])
        return Distillation(
            self.pipe.unet, student, self.condition, self.noise_schedule, self.data, taps,
            loss_weights(parameters, settings), augmentation(parameters),
        )  # fmt: skip

    def _same_run(self) -> dict[str, object]:
        """What a resumption must find as it was, beside the trainer's own settings."""
        return {"teacher": self.settings.teacher, "plan": self.plan, "data": self.data.key,
                "taps": self.parameters["kd"], "weights": self.distillation.weights,
                "augmentation": self.distillation.augmentation}  # fmt: skip

    def steps(self) -> Iterator[Step]:
        """The loop: one optimizer step after another, each logged, every so many the averaged student judged."""
        trainer, every = self.trainer, self.settings.validation_steps
        if trainer.accelerator.is_main_process:
            print(describe(self), flush=True)
        try:
            if not self.validation.rows:
                self.validate()
            for step in trainer.steps(self.distillation.losses, self.data.num_examples):
                self.log.append(step.floats())
                trainer.track(self.log.rows[-1])
                if step.step % every == 0 or step.step == trainer.config.max_train_steps:
                    self.validate()
                yield step
        finally:
            trainer.finish_tracking()
            self.distillation.close()

    def validate(self) -> None:
        """Scores pictures of the averaged student, on the same captions and noise each time."""
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return
        with trainer.ema_weights() as averaged:
            trainer.scores = self.scorer.proxy(with_unet(self.pipe, averaged))
        self.validation.append({"step": trainer.step, **trainer.scores})
        trainer.track(trainer.scores)


def prepare(config: Mapping[str, object], folder: Path, device: str = "cpu") -> Training:
    """Loads the teacher, cuts the student out of it, encodes or opens the data.

    Args:
        config: what `run.start` wrote to config.json: the notebook's parameters, and as `resolved` the preset.
    """
    settings, plan = Preset(**config["resolved"]), requested_plan(config)
    seed = config["seed"] or 0
    pipe = load_pipeline(settings.teacher, device)
    student = build_student(pipe.unet, plan)  # in full precision, from the teacher before it is rounded
    if config["gradient_checkpointing"]:
        student.enable_gradient_checkpointing()
    dtype = DTYPES[precision(settings, device)]
    if dtype is torch.float16 and isinstance(pipe, StableDiffusionXLPipeline):
        raise ValueError("SDXL's autoencoder overflows in fp16: use mixed_precision='bf16' or 'no'")
    pipe.to(dtype=dtype)
    for unet in (pipe.unet, student):
        unet.to(memory_format=torch.channels_last if config["channels_last"] else torch.contiguous_format)
        if config["compiled"]:
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # taps may come after the first pass
            unet.compile()
    return Training(
        config, settings, plan, folder, pipe, student, load_data(settings, pipe, config["cache_dir"], seed),
        TextConditioning(pipe, settings.resolution), DDPMScheduler.from_config(pipe.scheduler.config),
        tap_pairs(plan, pipe.unet.config, config["kd"]), Scorer(settings, device, seed),
    )  # fmt: skip


def short_run(job: Training, steps: int, seed: int, copied: bool = True, **changes) -> dict[str, float]:
    """Proxy scores of a student that learned for a few steps in another way than `job`'s; nothing is kept.

    Args:
        copied: start from the teacher's weights, or from random ones.
        changes: parameters of notebook 03 with other values.
    """
    settings = replace(job.settings.with_parameters(**changes), max_train_steps=steps)
    parameters = {**job.parameters, **changes, "seed": seed, "trackers": None}
    student = build_student(job.pipe.unet, job.plan, copy=copied, seed=seed).float()
    distillation = job.distil(student, parameters, settings)
    config = replace(training_config(parameters, settings, job.pipe.device.type), checkpoint_steps=0)
    trainer = Trainer(student, config, job.dir / "ablation")
    for _ in trainer.steps(distillation.losses, job.data.num_examples):
        pass
    distillation.close()
    with trainer.ema_weights() as averaged:
        return job.scorer.proxy(with_unet(job.pipe, averaged))


def precision(settings: Preset, device: str) -> str:
    """The compute precision: the preset's on a GPU; on a CPU half precision is slower than full."""
    return settings.mixed_precision if device == "cuda" else "no"


def training_config(parameters: Mapping, settings: Preset, device: str) -> TrainingConfig:
    """The engine's settings for these parameters."""
    shared = {f.name for f in fields(TrainingConfig)} & {f.name for f in fields(Preset)}
    values = {name: getattr(settings, name) for name in shared} | {"mixed_precision": precision(settings, device)}
    trackers = tuple(name.strip() for name in (parameters["trackers"] or "").split(",") if name.strip())
    return TrainingConfig(
        **values, seed=parameters["seed"] or 0, optimizer=parameters["optimizer"], trackers=trackers,
        ema_device=parameters["ema_device"], checkpoint_steps=settings.validation_steps,
        checkpoints_kept=parameters["checkpoints_kept"],
    )  # fmt: skip


def loss_weights(parameters: Mapping, settings: Preset) -> LossWeights:
    """λ_sd, λ_out, λ_feat and what goes beyond the paper."""
    weights = settings.lambda_sd, settings.lambda_kd_output, settings.lambda_kd_feat
    return LossWeights(*weights, parameters["normalise_features"], min_snr_gamma=parameters["min_snr_gamma"])


def augmentation(parameters: Mapping) -> Augmentation:
    """What is done to captions and noise."""
    names = [f.name for f in fields(Augmentation)]
    return Augmentation(**{name: parameters[name] for name in names})


def describe(training: Training) -> str:
    """What the run will hold in memory whatever the batch, and on disk."""
    gb = {name: f"{name} {size / 1e9:.2f}" for name, size in training.trainer.training_bytes().items()}
    frozen = (training.pipe.unet, training.pipe.vae, *training.condition.encoders)
    teacher = sum(p.numel() * p.element_size() for part in frozen for p in part.parameters())
    kept, one = training.trainer.config.checkpoints_kept, training.trainer.checkpoint_bytes
    return (f"memory in GB, beside activations: {', '.join(gb.values())}, teacher and its other parts "
            f"{teacher / 1e9:.2f}; disk: {kept} checkpoints of {one / 1e9:.2f} GB")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as a config.json says, in as many processes as it is launched in; leaves checkpoints, unet, unet_ema."""
    parser = argparse.ArgumentParser(prog="python -m bksdm_utils.training.job", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="config.json in the folder of the run")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="of notebook 03; with any of them config.json is written first")  # fmt: skip
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = PartialState(cpu=device == "cpu")
    if chosen.parameter and state.is_main_process:
        chosen.config.parent.mkdir(parents=True, exist_ok=True)
        given = {name: literal(value) for name, value in chosen.parameter}
        write_json(chosen.config, configure(find_notebook("03"), given)[0])
    state.wait_for_everyone()
    config, folder = json.loads(chosen.config.read_text(encoding="utf-8")), chosen.config.parent
    try:
        with folder_lock(folder):
            training = prepare(config, folder, device)
            training.begin(resume=config["resume"])
            _train_to_the_end(training, loud=state.is_main_process)
    except Exception as error:
        print(f"{LAST_WORDS[0]}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise
    if state.is_main_process:
        mark_finished(folder)
    return 0


def _train_to_the_end(training: Training, loud: bool) -> None:
    total, said = training.trainer.config.max_train_steps, 0.0
    for step in training.steps():
        if loud and time.monotonic() - said > 10:
            print(f"step {step.step}/{total}  {step.images_per_second:.1f} images/s", flush=True)
            said = time.monotonic()
    training.trainer.save()
    if loud:
        training.trainer.save_models()
    training.trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":  # accelerate launch -m bksdm_utils.training.job --config FOLDER/config.json
    raise SystemExit(main())
