"""DreamBooth (arXiv 2208.12242) by full fine-tuning or LoRA (arXiv 2106.09685) of few images (notebook 05)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..config.dreambooth import DreamBoothTraining
from ..config.training import Cropping, Training
from ..core.losses import Batch, training_target
from ..data.images import to_pixels
from ..files import CsvLog
from ..models.devices import supported_precision, to_device
from ..models.hashes import architecture_hash, model_hash
from ..models.lora import LORA_BASE
from ..models.pipelines import Pipeline, own_copy
from ..models.saving import save_model
from ..training.encoding import crop_centres, encoding_batch, posterior, token_ids
from ..training.rng import BatchRng
from ..training.step import Step
from ..training.trainer import Trainer
from .subjects import Subject, images_hash

CONTENT = ("methods", "identifier", "prior_loss_weight", "train_text_encoder", "lora_rank", "lora_alpha",
           "lora_targets", "lora_dropout", "lora_text_rank", "lora_text_alpha", "lora_text_targets",
           "lora_text_dropout", "text_learning_rate", "random_crops", "interpolation")  # fmt: skip


class DreamBoothModel(nn.Module):
    """U-Net and text encoder of a pipeline as one model, so that both are trained and saved together.

    The networks are the pipeline's own: it samples with what has been learned so far.

    Args:
        config: for one method, as `config.for_method` gives it: "full" trains all weights of the U-Net, "lora"
            adapters in it, W x + (alpha / rank) B A x; with `train_text_encoder` the same in the text encoder.

    Raises:
        ValueError: an SDXL pipeline, or LoRA targets that name no layer.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, config: DreamBoothTraining):
        super().__init__()
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise ValueError(f"DreamBooth is not written for a {type(pipeline).__name__}: expected SD-v1 or SD-v2")
        (self.method,) = config.methods
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self.base = architecture_hash(pipeline.unet)
        full = self.method == "full"
        self.unet.requires_grad_(full)
        self.text_encoder.requires_grad_(full and bool(config.train_text_encoder))
        pipeline.vae.requires_grad_(False)
        if full:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            unet = config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_dropout
            _add_adapters(self.unet, *unet)
            if config.train_text_encoder:
                text = config.lora_text_rank, config.lora_text_alpha, config.lora_text_targets, config.lora_text_dropout
                _add_adapters(self.text_encoder, *text)

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w), (B,), (B, T) -> the U-Net's prediction, (B, 4, h, w)."""
        hidden_states = self.text_encoder(token_ids)[0]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=hidden_states).sample

    @property
    def num_trained(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save(self, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        """Full: a whole pipeline. LoRA: what `pipe.load_lora_weights(folder)` takes, with alphas and base model."""
        if self.method == "full":
            save_model(pipeline, folder)
            return
        options = {}
        for name, part in (("unet", self.unet), ("text_encoder", self.text_encoder)):
            if getattr(part, "peft_config", None):
                options[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
                options[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, **options)
        file = folder / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as written:
            metadata = {**written.metadata(), LORA_BASE: self.base}
        save_file(load_file(file), file, metadata=metadata)


def _add_adapters(part: nn.Module, rank: int, alpha: float, targets: tuple[str, ...], dropout: float) -> None:
    layers = [name for name, layer in part.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):  # PEFT ignores such a target
            raise ValueError(f"no layer of the {type(part).__name__} is called {target}: expected ends of names such "
                             f"as {layers[-1]}")  # fmt: skip
    adapters = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout)
    part.add_adapter(adapters, "default")


@torch.no_grad()
def encode(pipeline: Pipeline, captioned: Sequence[tuple[str, Image.Image]], resolution: int, crop: Cropping) -> tuple:
    """Mean and deviation, (N, 4, h, w), of the posterior of N cropped images, and their captions' ids, (N, T).

    Every random crop counts as an image. All on the CPU, where a batch is put together; a GPU would have to be waited
    for.
    """
    size, parts = encoding_batch(resolution), []
    cropped = [(caption, image, centre) for i, (caption, image) in enumerate(captioned)
               for centre in crop_centres(str(i), crop.random_crops)]  # fmt: skip
    for start in range(0, len(cropped), size):
        chosen = cropped[start : start + size]
        pixels = [to_pixels(image, resolution, centre, crop.interpolation) for _, image, centre in chosen]
        parts.append(posterior(pipeline, torch.stack(pixels)))
    mean, std = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    return mean, std, token_ids(pipeline, [caption for caption, *_ in cropped])


@dataclass(frozen=True)
class SubjectBatches:
    """Batches of a subject's images, followed by as many of its class, if any (prior preservation).

    Attributes:
        encoded: of the subject's images and of its class's, if any, as `encode` gives them.
    """

    encoded: Sequence[tuple]
    num_train_timesteps: int
    device: torch.device | str = "cpu"

    @property
    def num_examples(self) -> int:
        """How many images the subject has, every crop counted."""
        return len(self.encoded[0][0])

    def __call__(self, rng: BatchRng) -> Batch:
        """One micro-batch; both halves use the same generators, one after the other."""
        parts = [self._sampled(rng, *encoded) for encoded in self.encoded]
        return Batch(*(to_device(torch.cat(tensors), self.device) for tensors in zip(*parts, strict=True)))

    def _sampled(self, rng: BatchRng, mean: torch.Tensor, std: torch.Tensor, token_ids: torch.Tensor) -> tuple:
        indices = replace(rng, num_examples=len(mean)).indices  # a permutation of these images, epoch by epoch
        shape = mean.shape[1:]
        latents = mean[indices] + std[indices] * rng.normal(*shape)
        return latents, rng.normal(*shape), rng.integers(self.num_train_timesteps), token_ids[indices]


@dataclass(frozen=True)
class DreamBoothRun:
    """One model learning one subject by one method: `for step in run.steps(): …`, then `run.save()`.

    Attributes:
        pipeline: samples with what has been learned so far.
        scheduler: the noise schedule; for ε- and v-prediction.
        prior_loss_weight: with 0, a batch holds the subject's images only.
        log, points: losses and costs of every step; scores during training, for whoever measures them.
    """

    pipeline: StableDiffusionPipeline
    model: DreamBoothModel
    trainer: Trainer
    batches: SubjectBatches
    scheduler: DDPMScheduler
    prior_loss_weight: float
    log: CsvLog
    points: CsvLog

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of the subject's images, plus, weighted, that of its class's (prior preservation)."""
        noisy_latents = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = training_target(self.scheduler, batch.latents, batch.noise, batch.timesteps)
        prediction = model(noisy_latents, batch.timesteps, batch.token_ids)
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
        if not self.prior_loss_weight:
            loss = errors.mean()
            return {"loss": loss, "loss_instance": loss}
        instance, prior = (half.mean() for half in errors.chunk(2))
        return {"loss": instance + self.prior_loss_weight * prior, "loss_instance": instance, "loss_prior": prior}

    def steps(self) -> Iterator[Step]:
        """Trains, logging and yielding after every optimizer step; the caller may sample in between."""
        for step in self.trainer.steps(self.losses, self.batches):
            self.log.append(step.floats())
            self.model.eval()  # adapters may have dropout, which is not for sampling
            yield step
            self.model.train()
        self.model.eval()

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
    captioned = list(zip(subject.captions(config.identifier), subject.images, strict=True))
    groups = [captioned, class_images] if config.prior_loss_weight else [captioned]
    encoded = [encode(own, group, side, config) for group in groups]
    scheduler = DDPMScheduler.from_config(own.scheduler.config)
    batches = SubjectBatches(encoded, scheduler.config.num_train_timesteps, own.device)
    fingerprint = {"base": model_hash(pipeline), "subject": images_hash(captioned), "resolution": side,
                   "class_images": images_hash(class_images), **{n: getattr(config, n) for n in CONTENT}}  # fmt: skip
    precision = supported_precision(config.mixed_precision, own.device.type)
    rates = {} if config.text_learning_rate is None else {"text_encoder.": config.text_rate_factor}
    settings = config.part(Training, mixed_precision=precision)
    trainer = Trainer(model, settings, folder, config.resume, fingerprint, rates=rates)
    logs = (CsvLog(folder / name, trainer.step) for name in ("log.csv", "along.csv"))
    return DreamBoothRun(own, model, trainer, batches, scheduler, config.prior_loss_weight, *logs)
