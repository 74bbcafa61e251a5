"""DreamBooth (arXiv 2208.12242): a Stable Diffusion learns one subject from a few images (notebook 05)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import nn

from ..config.dreambooth import DreamBoothTraining
from ..config.training import Training
from ..core.losses import Batch, training_target
from ..data.images import to_pixels
from ..files import CsvLog
from ..models.hashes import model_hash
from ..models.pipelines import Pipeline, own_copy
from ..training.encoding import encoding_batch, posterior, token_ids
from ..training.rng import BatchRng
from ..training.step import Step
from ..training.trainer import Trainer
from .model import DreamBoothModel
from .subjects import Subject, images_hash

CONTENT = ("methods", "identifier", "prior_loss_weight", "train_text_encoder", "lora_rank", "lora_alpha",
           "lora_targets", "lora_text_rank", "lora_text_alpha", "lora_text_targets")  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """Latents of a few captioned images: the posterior's mean and deviation, (N, 4, h, w), and token ids, (N, T)."""

    mean: torch.Tensor
    std: torch.Tensor
    token_ids: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pipeline: Pipeline, images: Sequence[Image.Image], captions: Sequence[str], resolution: int) -> Moments:
        """Encodes images, centre-cropped to `resolution`."""
        size, parts = encoding_batch(resolution), []
        for start in range(0, len(images), size):
            pixels = torch.stack([to_pixels(image, resolution) for image in images[start : start + size]])
            parts.append(posterior(pipeline, pixels))
        mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return cls(mean, std, token_ids(pipeline, captions).to(mean.device))

    def batch(self, rng: BatchRng, num_train_timesteps: int) -> tuple[torch.Tensor, ...]:
        """Latents sampled from the posteriors, noise, timesteps and token ids of one micro-batch."""
        indices = replace(rng, num_examples=len(self.mean)).indices  # a permutation of these images, epoch by epoch
        shape, device = self.mean.shape[1:], self.mean.device
        latents = self.mean[indices] + self.std[indices] * rng.normal(*shape).to(self.mean)
        noise = rng.normal(*shape).to(latents)
        return latents, noise, rng.integers(num_train_timesteps).to(device), self.token_ids[indices]


@dataclass(frozen=True)
class SubjectBatches:
    """Batches of a subject's images, followed by as many of its class, if any (prior preservation)."""

    instance: Moments
    prior: Moments | None
    num_train_timesteps: int

    @property
    def num_examples(self) -> int:
        """How many images the subject has."""
        return len(self.instance.mean)

    def __call__(self, rng: BatchRng) -> Batch:
        moments = [self.instance] if self.prior is None else [self.instance, self.prior]
        parts = [some.batch(rng, self.num_train_timesteps) for some in moments]
        return Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class DreamBoothLoss:
    """The loss of the subject's images, plus, weighted, that of its class's (prior preservation).

    Attributes:
        scheduler: the noise schedule; for ε- and v-prediction.
        prior_loss_weight: with 0, the batch holds the subject's images only.
    """

    scheduler: DDPMScheduler
    prior_loss_weight: float

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        noisy_latents = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = training_target(self.scheduler, batch.latents, batch.noise, batch.timesteps)
        prediction = model(noisy_latents, batch.timesteps, batch.token_ids)
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
        if not self.prior_loss_weight:
            loss = errors.mean()
            return {"loss": loss, "loss_instance": loss}
        instance, prior = (half.mean() for half in errors.chunk(2))
        return {"loss": instance + self.prior_loss_weight * prior, "loss_instance": instance, "loss_prior": prior}


@dataclass(frozen=True)
class DreamBoothRun:
    """One model learning one subject by one method: `for step in run.steps(): …`, then `run.save()`."""

    pipeline: StableDiffusionPipeline  # samples with what has been learned so far
    model: DreamBoothModel
    trainer: Trainer
    loss: DreamBoothLoss
    batches: SubjectBatches
    log: CsvLog  # losses and costs of every step
    points: CsvLog  # scores during training, for whoever measures them

    def steps(self) -> Iterator[Step]:
        """Trains, logging and yielding after every optimizer step; the caller may sample in between."""
        for step in self.trainer.steps(self.loss, self.batches):
            self.log.append(step.floats())
            yield step

    def save(self) -> int:
        """`DreamBoothModel.save` to saved/ in the run's folder; returns its bytes."""
        folder = self.trainer.output_dir / "saved"
        self.model.save(self.pipeline, folder)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prepare(
    pipeline: StableDiffusionPipeline, subject: Subject, config: DreamBoothTraining, folder: Path,
    class_images: Sequence[tuple[str, Image.Image]] = (),
) -> DreamBoothRun:  # fmt: skip
    """Copies U-Net and text encoder of a pipeline in full precision, encodes the images, sets up the trainer.

    Args:
        config: for one method, as `config.for_method` gives it.
        class_images: (caption, image) of the subject's class, where `prior_loss_weight` is not 0.

    Raises:
        ValueError: settings that cannot work, or a checkpoint in `folder` of a run with others.
    """
    own = own_copy(pipeline)
    own.unet.float()
    own.text_encoder.float()
    if config.gradient_checkpointing:
        own.unet.enable_gradient_checkpointing()
    model = DreamBoothModel(own, config)
    side = config.resolution or own.unet.config.sample_size * own.vae_scale_factor
    instance, prior = Moments.of(own, subject.images, subject.captions(config.identifier), side), None
    if config.prior_loss_weight:
        captions, images = zip(*class_images, strict=True)
        prior = Moments.of(own, images, captions, side)
    scheduler = DDPMScheduler.from_config(own.scheduler.config)
    fingerprint = {"base": model_hash(pipeline), "subject": subject.key, "class_images": images_hash(class_images),
                   "resolution": side, **{name: getattr(config, name) for name in CONTENT}}  # fmt: skip
    precision = config.mixed_precision if own.device.type == "cuda" else "no"
    trainer = Trainer(model, config.part(Training, mixed_precision=precision), folder, config.resume, fingerprint)
    batches = SubjectBatches(instance, prior, scheduler.config.num_train_timesteps)
    logs = (CsvLog(folder / name, trainer.step) for name in ("log.csv", "along.csv"))
    return DreamBoothRun(own, model, trainer, DreamBoothLoss(scheduler, config.prior_loss_weight), batches, *logs)
