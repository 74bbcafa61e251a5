"""Makes the storybook teacher: a VAE, a CLIP and a U-Net, each trained from random weights (notebook 00)."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from ..config.surgery import StorybookWorld
from ..config.training import Training
from ..data.rendering import render
from ..data.scenes import SIZE, Scene, sample_scene
from ..evaluation.scorer import Scorer
from ..files import CsvLog, write_json
from ..models.pipelines import load_pipeline
from ..training.rng import BatchRng
from ..training.trainer import LossFunction, Trainer
from . import networks
from .networks import LATENT_CHANNELS, LATENT_SIZE, SCHEDULE, to_clip, to_unit

NUM_SCENES = 48_000
_TRAINING = {"lr_schedule": "cosine", "ema_decay": 0.99, "checkpoint_steps": 200}
_AUTOENCODER = {**_TRAINING, "batch_size": 16, "lr_warmup_steps": 50, "weight_decay": 0.0}
CONFIGS = {
    "vae": Training(**_AUTOENCODER, max_train_steps=3_000, learning_rate=2e-3),
    "clip": Training(**_TRAINING, max_train_steps=2_300, batch_size=96, learning_rate=2e-3, lr_warmup_steps=100,
                     weight_decay=0.05, adam_beta2=0.98).but(checkpoint_steps=100),
    "unet": Training(**_TRAINING, max_train_steps=9_000, batch_size=32, learning_rate=1e-3, lr_decay_start=0.3,
                     lr_warmup_steps=200).but(ema_decay=0.999),
    "decoder": Training(**_AUTOENCODER, max_train_steps=1_600, learning_rate=1e-3),
}  # fmt: skip


def _rendered(seed: int, split: str) -> np.ndarray:
    return np.asarray(render(sample_scene(seed, split), seed))


def rendered_images(seeds: Sequence[int], split: str = "train") -> torch.Tensor:
    """Renders scenes of a split by their seeds: uint8, (len(seeds), 3, 64, 64)."""
    with ProcessPoolExecutor() as pool:
        images = list(pool.map(partial(_rendered, split=split), seeds, chunksize=256))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def scenes(num_scenes: int, split: str = "train") -> list[Scene]:
    """The scenes that `rendered_images(range(num_scenes), split)` renders."""
    return [sample_scene(seed, split) for seed in range(num_scenes)]


class Batches(NamedTuple):
    """Batches of `num_examples` examples, as `Trainer.steps` takes them."""

    num_examples: int
    make: Callable[[BatchRng], tuple]

    def __call__(self, rng: BatchRng) -> tuple:
        return self.make(rng)


def train(
    model: nn.Module, config: Training, folder: Path, loss_function: LossFunction, batches: Batches, log_every: int = 20
) -> Trainer:
    """Trains to the end, resuming; writes the mean losses of every `log_every` steps to log.csv, and the EMA model."""
    trainer = Trainer(model, config, folder, resume=True)
    log, sums, started = CsvLog(folder / "log.csv", trainer.step), {}, time.perf_counter()
    for step in trainer.steps(lambda model, batch: loss_function(model, *batch), batches):
        for name, value in step.losses.items():
            sums[name] = sums.get(name, 0) + value / log_every
        if step.step % log_every == 0:
            seconds = (time.perf_counter() - started) / log_every
            row = {"step": step.step, **{name: round(float(value), 5) for name, value in sums.items()}}
            log.append({**row, "learning_rate": step.learning_rate, "seconds_per_step": round(seconds, 3)})
            print("  ".join(f"{name} {value:.5g}" for name, value in log.rows[-1].items()), flush=True)
            sums, started = {}, time.perf_counter()
    trainer.save()
    with trainer.ema_weights() as averaged:
        averaged.save_pretrained(folder)
    return trainer


def train_vae(output_dir: Path, config: Training, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the VAE and sets its scaling factor so that the latents have unit variance."""
    images = rendered_images(range(min(num_scenes, 16_000)))
    torch.manual_seed(config.seed)
    vae = networks.new_vae().to(device)

    def batch(rng: BatchRng) -> tuple:
        noise = rng.normal(LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        return to_unit(images[rng.indices]).to(device), noise.to(device)

    trainer = train(vae, config, output_dir / "vae", networks.vae_loss, Batches(len(images), batch))
    with trainer.ema_weights(), torch.no_grad():
        latents = vae.encode(to_unit(images[:512]).to(device)).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        vae.save_pretrained(output_dir / "vae")


def train_clip(output_dir: Path, config: Training, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the text and vision towers together and saves them with their tokenizer."""
    world, images = scenes(num_scenes), rendered_images(range(num_scenes))
    tokenizer = networks.new_tokenizer([scene.caption for scene in world])
    tokenizer.save_pretrained(output_dir / "clip")
    torch.manual_seed(config.seed)

    def batch(rng: BatchRng) -> tuple:
        changes = random.Random(f"{rng.seed}-{rng.step}-{rng.positions.start}")
        chosen = [world[i] for i in rng.indices]
        negatives = zip(*(networks.hard_negatives(scene, changes) for scene in chosen), strict=True)
        captions = [scene.caption for group in (chosen, *negatives) for scene in group]
        numbers = {caption: number for number, caption in enumerate(captions)}
        meaning = torch.tensor([numbers[caption] for caption in captions], device=device)
        tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
        return to_clip(images[rng.indices].to(device)), tokens.to(device), meaning

    train(
        networks.new_clip(tokenizer).to(device),
        config,
        output_dir / "clip",
        networks.clip_loss,
        Batches(num_scenes, batch),
    )


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents of uint8 images, (N, 4, 16, 16), unscaled, on the CPU."""
    batches = (to_unit(batch).to(vae.device) for batch in images.split(256))
    return torch.cat([vae.encode(batch).latent_dist.mean.cpu() for batch in batches])


def finetune_decoder(output_dir: Path, config: Training, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the VAE's decoder on, its encoder frozen, so that the U-Net's latents keep their meaning.

    Stable Diffusion's own decoders were improved in this way after the fact; here it sharpens small things.
    """
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").to(device).eval()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    images = rendered_images(range(min(num_scenes, 8_000)))
    latents = encode_images(vae, images)

    def batch(rng: BatchRng) -> tuple:
        return latents[rng.indices].to(device), to_unit(images[rng.indices]).to(device)

    train(vae, config, output_dir / "decoder", networks.decoder_loss, Batches(len(images), batch))


def train_unet(output_dir: Path, config: Training, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the U-Net on the VAE's latents and the frozen text encoder; one caption in ten is empty."""
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "clip")
    text_encoder = CLIPTextModel.from_pretrained(output_dir / "clip").to(device).eval()
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").to(device).eval()
    latents = encode_images(vae, rendered_images(range(num_scenes))) * vae.config.scaling_factor
    captions = [scene.caption for scene in scenes(num_scenes)]
    tokens = tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids
    scheduler = DDPMScheduler(**SCHEDULE)
    torch.manual_seed(config.seed)
    unet = networks.new_unet().to(device, memory_format=torch.channels_last)

    def batch(rng: BatchRng) -> tuple:
        indices = torch.tensor(rng.indices)
        caption_indices = indices.where(rng.uniform() >= 0.1, torch.tensor(num_scenes))
        with torch.no_grad():
            hidden_states = text_encoder(tokens[caption_indices].to(device)).last_hidden_state
        noise, uniform = rng.normal(*latents.shape[1:]), rng.uniform()
        return latents[indices].to(device), noise.to(device), uniform.to(device), hidden_states

    train(
        unet, config, output_dir / "unet", partial(networks.unet_loss, scheduler=scheduler), Batches(num_scenes, batch)
    )


STAGES = {"vae": train_vae, "clip": train_clip, "unet": train_unet, "decoder": finetune_decoder}


def pipeline(output_dir: Path) -> StableDiffusionPipeline:
    """The trained networks as a plain diffusers pipeline, fp32."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(output_dir / "decoder"),
        text_encoder=CLIPTextModel.from_pretrained(output_dir / "clip", torch_dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(output_dir / "clip"),
        unet=UNet2DConditionModel.from_pretrained(output_dir / "unet"),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def export(output_dir: Path, destination: Path) -> None:
    """Writes teacher/ (the pipeline), clip/ (the metric network) and logs/ as data/storybook/ has them.

    U-Net and VAE are fp16. The text encoder stays fp32: transformers would load it in the precision it was saved in,
    and a half-precision text encoder does not fit the fp32 U-Net that diffusers loads by default.
    """
    (destination / "logs").mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        shutil.copy(output_dir / stage / "log.csv", destination / "logs" / f"{stage}.csv")
    made = pipeline(output_dir)
    made.unet.half()
    made.vae.half()
    made.save_pretrained(destination / "teacher")
    clip = CLIPModel.from_pretrained(output_dir / "clip", torch_dtype=torch.float32)
    clip.save_pretrained(destination / "clip")
    made.tokenizer.save_pretrained(destination / "clip")
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(destination / "clip")


@torch.no_grad()
def _reconstruction(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)


def reconstruction_psnr(vae: AutoencoderKL, num_images: int = 256) -> float:
    """Mean PSNR in dB over held-out images encoded and decoded by the VAE."""
    images = to_unit(rendered_images(range(num_images), "test")).to(vae.device)
    errors = (_reconstruction(vae, images) - images).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / errors)).mean().item()


def autoencode(vae: AutoencoderKL, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images encoded and decoded by the VAE."""
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    decoded = _reconstruction(vae, to_unit(pixels).to(vae.device))
    return VaeImageProcessor().postprocess(decoded)


@torch.no_grad()
def denoising(pipeline: StableDiffusionPipeline, captions: Sequence[str], config: StorybookWorld):
    """Timesteps, and for each caption the decoded latents at them: at every fourth step and at the last."""
    states = []

    def keep(_pipeline, step: int, timestep: int, kwargs: dict) -> dict:
        if step % 4 == 0 or step == config.num_inference_steps:
            states.append((int(timestep), kwargs["latents"] / pipeline.vae.config.scaling_factor))
        return kwargs

    generators = [torch.Generator().manual_seed(config.seed + i) for i in range(len(captions))]
    pipeline(list(captions), generator=generators, num_inference_steps=config.num_inference_steps,
             guidance_scale=config.guidance_scale, callback_on_step_end=keep)  # fmt: skip
    columns = [pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample) for _, latents in states]
    return [timestep for timestep, _ in states], list(zip(*columns, strict=True))


def score(folder: Path, num_images: int = 256, device: str = "cpu") -> None:
    """Writes scores.json: the teacher in `folder` on held-out captions, beside real renders of the same scenes."""
    config = StorybookWorld(clip=str(folder / "clip"), num_images=num_images)
    scorer, teacher = Scorer(config, device), load_pipeline(folder / "teacher", device)
    real = [render(scene, seed) for seed, scene in enumerate(scorer.scenes)]
    scores = {
        "num_images": num_images, "num_inference_steps": config.num_inference_steps, "seed": config.seed,
        "guidance_scale": config.guidance_scale, "psnr": round(reconstruction_psnr(teacher.vae), 2),
        "real": scorer.scores(real), "teacher": scorer.scores(scorer.sample(teacher)),
    }  # fmt: skip
    write_json(folder / "scores.json", scores)
    print(json.dumps(scores, indent=1))


def make(
    stages: Sequence[str], output_dir: Path, destination: Path, max_train_steps: int | None = None, device: str = "cpu",
    num_scenes: int = NUM_SCENES,
) -> None:  # fmt: skip
    """Runs stages of `STAGES` in order, each resuming; "export" writes and scores what they made.

    Raises:
        ValueError: an unknown stage.
    """
    if unknown := set(stages) - {*STAGES, "export"}:
        raise ValueError(f"stages are {', '.join(sorted(unknown))}: expected {', '.join(STAGES)}, export")
    for stage in stages:
        print(f"--- {stage}")
        if stage == "export":
            export(output_dir, destination)
            score(destination, device=device)
        else:
            config = CONFIGS[stage].but(**({"max_train_steps": max_train_steps} if max_train_steps else {}))
            STAGES[stage](output_dir, config, num_scenes, device)
