"""A distillation run from its parameters to a trained student (notebook 03 and `bksdm train`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DConditionModel

from .. import processes
from ..config.plan_files import find_plan
from ..config.training import KDTraining, Training
from ..core.families import TextConditioning
from ..core.losses import Batch, Distillation, LossWeights
from ..core.plans import RemovalPlan
from ..core.surgery import build_student
from ..core.taps import published_inert, tap_pairs
from ..files import CsvLog, folder_lock, read_log
from ..models.devices import DTYPES, supported_precision
from ..models.pipelines import Pipeline, load_pipeline, save_student_pipeline, with_unet
from .batches import KDBatches
from .checkpoints import Checkpoints
from .latents import LatentDataset, load_data
from .micro_batch import find_micro_batch
from .preview import Preview, PreviewFolder
from .speed import speed_up
from .step import Step
from .streams import StreamedDataset
from .trainer import Trainer, fixed_settings

LOGS = ("log.csv", "validation.csv")
Validation = Callable[[Pipeline], Mapping[str, float]]  # scores of a pipeline


@dataclass
class KDJob:
    """Teacher, student and data of one run; `begin` adds the trainer, `steps` is the loop.

    Attributes:
        pairs: (teacher module, student module) whose outputs are compared.
        validate_pipeline: called with the pipeline around the averaged student; it returns scores. None scores nothing.
        preview: the validation prompts, sampled by teacher and averaged student; None samples none.
    """

    config: KDTraining
    plan: RemovalPlan
    dir: Path
    pipe: Pipeline
    student: UNet2DConditionModel
    data: LatentDataset | StreamedDataset
    conditioning: TextConditioning
    noise_schedule: DDPMScheduler
    pairs: list[tuple[str, str]]
    validate_pipeline: Validation | None
    preview: PreviewFolder | None = None
    trainer: Trainer | None = None
    log: CsvLog | None = field(default=None, repr=False)
    validation: CsvLog | None = field(default=None, repr=False)

    def begin(self, resume: bool) -> None:
        """Makes losses, optimizer, EMA and logs; with `resume` they continue from the newest checkpoint.

        Raises:
            ValueError: another run writes to the folder; nothing in it is touched then. Or this student is trained
                already, and training is to start anew.
        """
        if self.trainer and self.trainer.step and not resume:
            raise ValueError("the student is trained already: `prepare` gives a fresh one, resume=True continues")
        self.distillation = self.distillation_of(self.student, self.config)
        with folder_lock(self.dir):
            settings = training_settings(self.config, self.pipe.device.type)
            self.trainer = Trainer(self.student, settings, self.dir, resume, self._fingerprint(), name="unet")
            self.log, self.validation = (CsvLog(self.dir / name, self.trainer.step) for name in LOGS)
        if self.config.find_batch_size:
            rates = find_micro_batch(self.trainer, self.losses, self.batches(self.config))
            print(f"images/s by micro-batch {rates}: using {self.trainer.micro_batch_size}")

    def progress(self, num_processes: int | None = None) -> Iterator[tuple[list[dict], list[dict]]]:
        """Trains, here or in `num_processes` processes of their own; yields the rows of log and validation so far.

        Those processes outlive this one: called again, also by another kernel, this follows them.

        Raises:
            ValueError: more processes than GPUs.
        """
        if num_processes is None:
            self.begin(self.config.resume)
            for _ in self.steps():
                yield self.log.rows, self.validation.rows
            return
        if self.pipe.device.type == "cuda" and num_processes > (gpus := torch.cuda.device_count()):
            raise ValueError(f"num_processes is {num_processes}: expected at most {gpus}, one for each GPU")
        if not (self.config.resume or processes.running(self.dir)):
            with folder_lock(self.dir):
                for name in LOGS:  # an older run's, which would pass for this one's until its first step
                    (self.dir / name).unlink(missing_ok=True)
        processes.launch(self.dir, num_processes)
        for _ in processes.follow(self.dir):
            yield tuple(read_log(self.dir / name) for name in LOGS)
        self.config = self.config.but(resume=True, checkpoint=None)  # they went on from there
        self.begin(resume=True)

    def distillation_of(self, student: UNet2DConditionModel, config: KDTraining) -> Distillation:
        """The losses of `student` with these parameters, by this run's teacher."""
        taps = tap_pairs(self.plan, self.pipe.unet.config, config.kd)
        inert = published_inert(taps) if config.published_tiny else ()
        parts = self.pipe.unet, student, self.conditioning, self.noise_schedule
        return Distillation(*parts, taps, loss_weights(config), inert)

    def batches(self, config: KDTraining) -> KDBatches:
        """This run's data as batches, augmented with these parameters."""
        steps = self.noise_schedule.config.num_train_timesteps
        return KDBatches.of(config, self.data, steps, self.pipe.device)

    def losses(self, student: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The trainer's loss function."""
        return self.distillation.losses(student, batch).named()

    def _fingerprint(self) -> dict[str, object]:
        """What a resumption must find as it was, beside the trainer's own settings."""
        config = self.config
        augmentation = {"caption_dropout": config.caption_dropout, "random_conditioning": config.random_conditioning,
                        "noise_offset": config.noise_offset}  # fmt: skip
        taps = config.kd + ", published_tiny" * config.published_tiny
        return {"teacher": config.teacher, "plan": self.plan, "data": self.data.key, "taps": taps,
                "weights": self.distillation.weights, "augmentation": augmentation,
                "copy_weights": config.copy_weights}  # fmt: skip

    def steps(self) -> Iterator[Step]:
        """The loop: one optimizer step after another, each logged; at intervals the averaged student is validated."""
        trainer, every = self.trainer, self.config.validation_steps
        if trainer.accelerator.is_main_process:
            print(describe(self), flush=True)
        try:
            if not self.validation.rows:
                self.validate()
            for step in trainer.steps(self.losses, self.batches(self.config)):
                self.log.append(step.floats())
                trainer.track(self.log.rows[-1])
                if step.step % every == 0 or step.step == trainer.config.max_train_steps:
                    self.validate()
                yield step
        finally:
            trainer.finish_tracking()
            self.distillation.close()

    def save(self) -> Path:
        """Saves the student, raw and averaged, and `pipeline`, a whole one around the averaged; returns its folder."""
        self.trainer.save_models()
        folder = self.dir / "pipeline"
        save_student_pipeline(self.pipe, self.config.teacher, self.trainer.result, folder)
        return folder

    def validate(self) -> None:
        """Samples and scores the averaged student, on the same captions and noise each time.

        Scores need a metric network; the images are saved beside the teacher's.
        """
        trainer = self.trainer
        if not trainer.accelerator.is_main_process or not (self.validate_pipeline or self.preview):
            return
        with trainer.ema_weights() as averaged:
            student = with_unet(self.pipe, averaged)
            trainer.scores = dict(self.validate_pipeline(student)) if self.validate_pipeline else {}
            if self.preview:
                grid, scores = self.preview.sample(self.pipe, student, trainer.step)
                trainer.scores |= scores
                trainer.track_images(grid)
        self.validation.append({"step": trainer.step, **trainer.scores})
        trainer.track(trainer.scores)


def check_resumption(config: KDTraining, folder: Path, device: str) -> None:
    """Raises ValueError where there is no checkpoint of this name, or one with other settings, before any loading."""
    settings = training_settings(config, device)
    checkpoints = Checkpoints(folder, "unet", settings.checkpoints_kept)
    if config.resume and (newest := checkpoints.find(config.checkpoint)):
        checkpoints.check(newest, fixed_settings(settings), config.max_train_steps)


def prepare(
    config: KDTraining, folder: Path, device: str, validate: Validation | None, preview: Preview | None = None
) -> KDJob:
    """Loads the teacher, cuts the student out of it, encodes or opens the data.

    Raises:
        ValueError: among others, a checkpoint to resume from that is missing or of another run.
    """
    check_resumption(config, folder, device)
    pipe = load_pipeline(config.teacher, device)
    plan = find_plan(config.variant, pipe.unet.config)
    # In full precision, from the teacher before it is rounded.
    student = build_student(pipe.unet, plan, copy=config.copy_weights, seed=config.seed)
    data = load_data(config, pipe, config.seed)  # latents too: the autoencoder stays in full precision
    conditioning = TextConditioning(pipe, config.resolution)
    for part in (pipe.unet, *conditioning.encoders):
        torch.nn.Module.to(part, DTYPES[precision(config, device)])  # diffusers' own logs a warning
    speed_up(pipe.unet, student, config)
    return KDJob(
        config, plan, folder, pipe, student, data, conditioning, DDPMScheduler.from_config(pipe.scheduler.config),
        tap_pairs(plan, pipe.unet.config, config.kd), validate, preview and PreviewFolder(folder, preview),
    )  # fmt: skip


def short_run(job: KDJob, steps: int, seed: int, copied: bool = True, **changes: object) -> Mapping[str, float]:
    """Validation scores of a student trained for a few steps in another way than `job`'s; nothing is kept.

    Args:
        copied: start from the teacher's weights, or from random ones.
        changes: parameters of notebook 03 with other values.
    """
    config = job.config.but(**changes, seed=seed, max_train_steps=steps, trackers=(), checkpoint_steps=0)
    student = build_student(job.pipe.unet, job.plan, copy=copied, seed=seed).float()
    distillation = job.distillation_of(student, config)
    trainer = Trainer(student, training_settings(config, job.pipe.device.type), job.dir / "ablation")
    for _ in trainer.steps(lambda model, batch: distillation.losses(model, batch).named(), job.batches(config)):
        pass
    distillation.close()
    with trainer.ema_weights() as averaged:
        return job.validate_pipeline(with_unet(job.pipe, averaged))


def precision(config: Training, device: str) -> str:
    """The precision that a run computes in on this device."""
    return supported_precision(config.mixed_precision, device)


def training_settings(config: Training, device: str) -> Training:
    """What the trainer needs of a notebook's parameters."""
    return config.part(Training, mixed_precision=precision(config, device))


def loss_weights(config: KDTraining) -> LossWeights:
    """λ_sd, λ_out, λ_feat and what goes beyond the paper."""
    weights = config.lambda_sd, config.lambda_kd_output, config.lambda_kd_feat
    return LossWeights(*weights, config.normalise_features, min_snr_gamma=config.min_snr_gamma)


def describe(job: KDJob) -> str:
    """What the run will need in memory whatever the batch, and on disk."""
    gb = {name: f"{name} {size / 1e9:.2f}" for name, size in job.trainer.training_bytes().items()}
    frozen = (job.pipe.unet, job.pipe.vae, *job.conditioning.encoders)
    teacher = sum(p.numel() * p.element_size() for part in frozen for p in part.parameters())
    kept, one = job.trainer.config.checkpoints_kept or "all", job.trainer.checkpoint_bytes
    return (f"memory in GB, beside activations: {', '.join(gb.values())}, teacher and its other parts "
            f"{teacher / 1e9:.2f}; disk: {kept} checkpoints of {one / 1e9:.2f} GB")  # fmt: skip


def train(
    config: KDTraining, folder: Path, device: str, validate: Validation | None, preview: Preview | None = None
) -> None:
    """Trains to the end, in as many processes as it is launched in; leaves checkpoints and what `KDJob.save` saves."""
    state, printed = PartialState(cpu=device == "cpu"), 0.0
    with folder_lock(folder):
        job = prepare(config, folder, device, validate, preview)
        job.begin(resume=config.resume)
        for step in job.steps():
            if state.is_main_process and time.monotonic() - printed > 10:
                print(f"step {step.step}/{config.max_train_steps}  {step.images_per_second:.1f} images/s", flush=True)
                printed = time.monotonic()
        job.trainer.save()
        if state.is_main_process:
            job.save()
        state.wait_for_everyone()
