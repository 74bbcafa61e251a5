"""Makes the storybook teacher: a VAE, a CLIP and a U-Net, each trained from random weights (notebook 00)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from ..config.evaluation import FolderSampling
from ..config.surgery import StorybookWorld
from ..config.training import Training
from ..data.rendering import render
from ..data.scenes import SIZE, WORLD, World
from ..evaluation.networks import MetricClip
from ..evaluation.sampling import generate
from ..files import write_json
from ..models.pipelines import load_pipeline
from ..models.saving import save_tokenizer
from ..training.rng import BatchRng
from . import networks
from .clip import train_clip, train_text
from .networks import LATENT_CHANNELS, LATENT_SIZE, SCHEDULE, to_unit
from .recipes import RECIPE, Recipe
from .scoring import accuracies
from .stages import Batches, encode_captions, encode_images, reconstruction, rendered_images, scenes, train


def train_vae(
    output_dir: Path, config: Training, num_scenes: int, device: str = "cpu", recipe: Recipe = RECIPE
) -> None:
    """Trains the VAE and sets its scaling factor so that the latents have unit variance; always on 64 pixels."""
    images = rendered_images(range(min(num_scenes, 16_000)), world=replace(recipe.world, size=SIZE))
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


def finetune_decoder(
    output_dir: Path, config: Training, num_scenes: int, device: str = "cpu", recipe: Recipe = RECIPE
) -> None:
    """Trains the VAE's decoder on, its encoder frozen, so that the U-Net's latents keep their meaning.

    Stable Diffusion's own decoders were improved in this way after the fact; here it sharpens small things.
    """
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").to(device).eval()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    vae.register_to_config(sample_size=recipe.world.size)
    images = rendered_images(range(min(num_scenes, 8_000)), world=recipe.world)
    latents = encode_images(vae, images)

    def batch(rng: BatchRng) -> tuple:
        return latents[rng.indices].to(device), to_unit(images[rng.indices]).to(device)

    train(vae, config, output_dir / "decoder", networks.decoder_loss, Batches(len(images), batch))


def train_unet(
    output_dir: Path, config: Training, num_scenes: int, device: str = "cpu", recipe: Recipe = RECIPE
) -> None:
    """Trains the U-Net on the VAE's latents and the frozen text encoder; one caption in ten is empty."""
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").to(device).eval()
    world = replace(recipe.world, pair_share=recipe.unet_pair_share)
    latents = encode_images(vae, rendered_images(range(num_scenes), world=world)) * vae.config.scaling_factor
    captions = [*(scene.caption for scene in scenes(num_scenes, world=world)), ""]
    hidden_states = encode_captions(output_dir / "text", output_dir / "text", captions, device)
    scheduler = DDPMScheduler(**SCHEDULE)
    torch.manual_seed(config.seed)
    unet = networks.new_unet(recipe.world.size // 4).to(memory_format=torch.channels_last)
    if recipe.start:
        _start_from(unet, recipe.start, output_dir / "text", captions[:4096])

    def batch(rng: BatchRng) -> tuple:
        indices = torch.tensor(rng.indices)
        caption_indices = indices.where(rng.uniform() >= 0.1, torch.tensor(num_scenes))
        noise, uniform = rng.normal(*latents.shape[1:]), rng.uniform()
        parts = latents[indices], noise, uniform, hidden_states[caption_indices]
        return tuple(part.to(device) for part in parts)

    loss = partial(networks.unet_loss, scheduler=scheduler)
    train(unet.to(device), config, output_dir / "unet", loss, Batches(num_scenes, batch))


def _start_from(unet: UNet2DConditionModel, pipeline: Path, text: Path, captions: Sequence[str]) -> None:
    """Takes the U-Net of another pipeline over, fitted to the new text encoder."""
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict())
    old = encode_captions(pipeline / "tokenizer", pipeline / "text_encoder", captions)
    networks.translate_text(unet, old, encode_captions(text, text, captions))


_TRAIN = {"vae": train_vae, "text": train_text, "clip": train_clip, "unet": train_unet, "decoder": finetune_decoder}


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


def export(output_dir: Path, destination: Path, recipe: Recipe = RECIPE) -> None:
    """Writes teacher/ (the pipeline), clip/ (the metric network) and logs/ as data/storybook/ has them.

    U-Net and VAE are fp16. The text encoder stays fp32: transformers would load it in the precision it was saved in,
    and a half-precision text encoder does not fit the fp32 U-Net that diffusers loads by default.
    """
    (destination / "logs").mkdir(parents=True, exist_ok=True)
    for stage in recipe.configs:
        shutil.copy(output_dir / stage / "log.csv", destination / "logs" / f"{stage}.csv")
    made = pipeline(output_dir)
    made.unet.half()
    made.vae.half()
    made.save_pretrained(destination / "teacher")
    save_tokenizer(made.tokenizer, destination / "teacher" / "tokenizer")
    clip = CLIPModel.from_pretrained(output_dir / "clip", torch_dtype=torch.float32)
    clip.save_pretrained(destination / "clip")
    save_tokenizer(made.tokenizer, destination / "clip")
    size = {"height": recipe.world.size, "width": recipe.world.size}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(destination / "clip")


def reconstruction_psnr(vae: AutoencoderKL, num_images: int = 256, world: World = WORLD) -> float:
    """Mean PSNR in dB over held-out images encoded and decoded by the VAE."""
    images = to_unit(rendered_images(range(num_images), "test", world)).to(vae.device)
    errors = (reconstruction(vae, images) - images).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / errors)).mean().item()


def autoencode(vae: AutoencoderKL, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images encoded and decoded by the VAE."""
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    decoded = reconstruction(vae, to_unit(pixels).to(vae.device))
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


def score(folder: Path, num_images: int = 256, device: str = "cpu", world: World = WORLD, split: str = "test") -> None:
    """Writes scores.json: the teacher in `folder` on held-out captions, beside real renders of the same scenes."""
    config = StorybookWorld(clip=str(folder / "clip"), num_images=num_images)
    clip, teacher = MetricClip(config.clip, device), load_pipeline(folder / "teacher", device)
    held_out = scenes(num_images, split, world)
    real = [render(scene, seed, world.size) for seed, scene in enumerate(held_out)]
    sampled = generate(teacher, [scene.caption for scene in held_out], **config.part(FolderSampling).values())
    scores = {
        "num_images": num_images, "num_inference_steps": config.num_inference_steps, "seed": config.seed,
        "guidance_scale": config.guidance_scale, "psnr": round(reconstruction_psnr(teacher.vae, world=world), 2),
        "real": accuracies(clip, real, held_out), "teacher": accuracies(clip, sampled, held_out),
    }  # fmt: skip
    write_json(folder / "scores.json", scores)
    print(json.dumps(scores, indent=1))


def make(
    stages: Sequence[str], output_dir: Path, destination: Path, max_train_steps: int | None = None, device: str = "cpu",
    num_scenes: int | None = None, recipe: Recipe = RECIPE,
) -> None:  # fmt: skip
    """Runs stages of a recipe in order, each resuming; "export" writes and scores what they made.

    Raises:
        ValueError: a stage that the recipe does not have.
    """
    if unknown := set(stages) - {*recipe.configs, "export"}:
        raise ValueError(f"stages are {', '.join(sorted(unknown))}: expected {', '.join(recipe.configs)}, export")
    for stage in stages:
        print(f"--- {stage}")
        if stage == "export":
            export(output_dir, destination, recipe)
            score(destination, device=device, world=recipe.world)
        else:
            config = recipe.configs[stage].but(**({"max_train_steps": max_train_steps} if max_train_steps else {}))
            _TRAIN[stage](output_dir, config, num_scenes or recipe.num_scenes, device, recipe)
