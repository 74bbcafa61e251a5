"""DreamBooth (arXiv 2208.12242): a Stable Diffusion learns one subject from a handful of images (notebook 05)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import nn

from ..config.training import TrainingConfig
from ..core.losses import training_target
from ..data.images import to_pixels
from ..files import CsvLog
from ..models.hashes import model_hash
from ..models.pipelines import Pipeline, own_copy
from ..training.encoding import encoding_batch, posterior, token_ids
from ..training.rng import BatchRng
from ..training.trainer import Step, Trainer
from .model import METHODS, DreamBoothModel, Lora
from .subjects import Subject, _images_hash


@dataclass(frozen=True)
class Recipe:
    """How a subject is learned; the defaults are BK-SDM's (its finetune_full.sh and finetune_lora.sh).

    Attributes:
        batch_size: pictures of the subject in a step; with prior preservation as many of its class.
        learning_rates: by method.
        resolution: pixels a side of the pictures; None is the pipeline's own.
    """

    subject: str = "dog2"
    identifier: str = "sks"
    max_train_steps: int = 800
    batch_size: int = 1
    learning_rates: tuple[tuple[str, float], ...] = (("full", 1e-6), ("lora", 1e-4))
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 0
    train_text_encoder: bool = True
    lora: Lora = Lora()
    prior_loss_weight: float = 1.0
    num_class_images: int = 200
    mixed_precision: str = "bf16"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    resolution: int | None = None

    def __post_init__(self):
        if self.prior_loss_weight < 0 or self.num_class_images < 0:
            raise ValueError(f"prior_loss_weight is {self.prior_loss_weight}, num_class_images {self.num_class_images}"
                             ": expected zero or more")  # fmt: skip
        if self.prior_loss_weight and not self.num_class_images:
            raise ValueError("prior preservation needs num_class_images of 1 or more, or a prior_loss_weight of 0")

    def with_parameters(self, **given) -> Recipe:
        """This recipe with what is not None put in place of its own; `learning_rate` is for every method."""
        rate = given.pop("learning_rate", None)
        told = {name: value for name, value in given.items() if value is not None}
        if rate is not None:
            told["learning_rates"] = tuple((method, rate) for method in METHODS)
        return replace(self, **told)

    def training_config(self, method: str, device: str, seed: int, checkpoint_steps: int = 0) -> TrainingConfig:
        """The engine's settings; on a CPU in full precision, and without an average of the weights."""
        return TrainingConfig(
            self.max_train_steps, self.batch_size, learning_rate=dict(self.learning_rates)[method],
            lr_schedule=self.lr_schedule, lr_warmup_steps=self.lr_warmup_steps, ema_decay=0.0, seed=seed,
            optimizer=self.optimizer,
            mixed_precision=self.mixed_precision if device == "cuda" else "no", checkpoint_steps=checkpoint_steps,
        )  # fmt: skip


# A network this small learns with larger steps, and needs more adapters than the paper's two to hold a pattern.
STORYBOOK = Recipe(
    "tabby", "z", 80, 8, (("full", 5e-4), ("lora", 1.5e-3)), "cosine", 0, False,
    Lora(targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")), num_class_images=48,
)  # fmt: skip


def recipe_of(preset: str) -> Recipe:
    """The recipe that suits a preset's teacher."""
    return STORYBOOK if preset == "storybook" else Recipe()


@dataclass
class Moments:
    """Latents of a few captioned pictures: the posterior's mean and deviation, (N, 4, h, w), and token ids, (N, T)."""

    mean: torch.Tensor
    std: torch.Tensor
    token_ids: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, pipeline: Pipeline, pictures: Sequence[Image.Image], captions: Sequence[str], resolution: int
    ) -> Moments:
        """Encodes pictures, centre-cropped to `resolution`."""
        size, found = encoding_batch(resolution), []
        for start in range(0, len(pictures), size):
            pixels = torch.stack([to_pixels(picture, resolution) for picture in pictures[start : start + size]])
            found.append(posterior(pipeline, pixels))
        mean, std = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cls(mean, std, token_ids(pipeline, captions).to(mean.device))

    def batch(self, indices: Sequence[int], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents drawn from the posteriors, and their captions' token ids."""
        return self.mean[indices] + self.std[indices] * noise.to(self.mean), self.token_ids[indices]


class DreamBooth:
    """The loss of DreamBooth: of the subject's pictures, plus, weighted, of the class's. `losses` is the engine's.

    Args:
        scheduler: the DDPM noise schedule; ε- and v-prediction both work.
        prior: pictures of the class; None trains without prior preservation.
    """

    def __init__(self, scheduler: DDPMScheduler, instance: Moments, prior: Moments | None, prior_weight: float = 1.0):
        self.scheduler, self.instance, self.prior, self.prior_weight = scheduler, instance, prior, prior_weight

    def losses(self, model: nn.Module, draw: BatchRng) -> dict[str, torch.Tensor]:
        """One micro-batch of the subject, and as many pictures of its class: loss, loss_instance, loss_prior."""
        parts = [self._example(self.instance, draw, draw.indices)]
        if self.prior is not None:
            others = replace(draw, num_examples=len(self.prior.mean))  # its own permutation, epoch after epoch
            parts.append(self._example(self.prior, draw, others.indices))
        noisy, timesteps, ids, target = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        errors = F.mse_loss(model(noisy, timesteps, ids).float(), target.float(), reduction="none").mean((1, 2, 3))
        instance, *prior = (part.mean() for part in errors.split(len(draw.positions)))
        losses = {"loss": instance, "loss_instance": instance}
        if prior:
            losses |= {"loss": instance + self.prior_weight * prior[0], "loss_prior": prior[0]}
        return losses

    def _example(self, moments: Moments, draw: BatchRng, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        shape, device = moments.mean.shape[1:], moments.mean.device
        latents, ids = moments.batch(indices, draw.normal(*shape))
        noise = draw.normal(*shape).to(latents)
        timesteps = draw.integers(self.scheduler.config.num_train_timesteps).to(device)
        target = training_target(self.scheduler, latents, noise, timesteps)
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps, ids, target


@dataclass
class DreamBoothRun:
    """One model learning one subject by one method: `for step in lesson.steps(): …`, then `lesson.save()`.

    The pipeline is a copy that shares what is not trained; it draws what has been learned so far.
    """

    pipeline: StableDiffusionPipeline
    model: DreamBoothModel
    trainer: Trainer
    loss: DreamBooth
    num_pictures: int
    log: CsvLog

    def steps(self) -> Iterator[Step]:
        """Trains, logging and yielding after every optimizer step; drawing in between is allowed."""
        for step in self.trainer.steps(self.loss.losses, self.num_pictures):
            self.log.append(step.floats())
            yield step

    def save(self, folder: Path) -> int:
        """`Personal.save`; returns the bytes of what was written."""
        self.model.save(self.pipeline, folder)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prepare(
    pipeline: StableDiffusionPipeline, subject: Subject, recipe: Recipe, method: str, folder: Path,
    class_images: Sequence[tuple[str, Image.Image]] = (), seed: int = 0, checkpoint_steps: int = 0,
    resume: bool = False,
) -> DreamBoothRun:  # fmt: skip
    """Copies U-Net and text encoder of a pipeline in full precision, encodes the pictures, sets up the engine.

    Whether its words can work `check_words` says.

    Args:
        class_images: (caption, picture) of the class, for prior preservation; none trains without.
        checkpoint_steps: steps between two checkpoints in `folder`, 0 keeps none.

    Raises:
        ValueError: a method or settings that cannot work, or a checkpoint of another lesson.
    """
    own = own_copy(pipeline)
    for part in (own.unet, own.text_encoder):
        part.float()
    if recipe.gradient_checkpointing:
        own.unet.enable_gradient_checkpointing()
    model = DreamBoothModel(own, method, recipe.train_text_encoder, recipe.lora, seed)
    side = recipe.resolution or own.unet.config.sample_size * own.vae_scale_factor
    instance = Moments.of(own, subject.real, subject.captions(recipe.identifier), side)
    prior = Moments.of(own, [p for _, p in class_images], [c for c, _ in class_images], side) if class_images else None
    loss = DreamBooth(DDPMScheduler.from_config(own.scheduler.config), instance, prior, recipe.prior_loss_weight)
    fixed = {"base": model_hash(pipeline), "subject": subject.key, "recipe": replace(recipe, max_train_steps=1),
             "method": method, "class_images": _images_hash(class_images), "resolution": side}  # fmt: skip
    config = recipe.training_config(method, own.device.type, seed, checkpoint_steps)
    trainer = Trainer(model, config, folder, resume, fixed, name="personal")
    return DreamBoothRun(own, model, trainer, loss, len(subject.pictures), CsvLog(folder / "log.csv", trainer.step))
