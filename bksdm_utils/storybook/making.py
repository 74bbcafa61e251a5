"""Makes the storybook teacher: a VAE, a CLIP and a U-Net, each trained from random weights (notebook 00)."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from ..config.presets import find_preset
from ..config.training import TrainingConfig
from ..data.rendering import render
from ..data.scenes import SIZE, Scene, sample_scene
from ..evaluation.scorer import Scorer
from ..files import CsvLog, write_json
from ..models.pipelines import load_pipeline
from ..training.trainer import Trainer, over_processes
from .networks import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    SCHEDULE,
    clip_loss,
    decoder_loss,
    hard_negatives,
    new_clip,
    new_tokenizer,
    new_unet,
    new_vae,
    to_clip,
    to_unit,
    unet_loss,
    vae_loss,
)

NUM_SCENES = 48_000


CONFIGS = {
    "vae": TrainingConfig(3_000, batch_size=16, learning_rate=2e-3, lr_schedule="cosine", lr_warmup_steps=50,
                          weight_decay=0.0, ema_decay=0.99, checkpoint_steps=200),
    "clip": TrainingConfig(2_300, batch_size=96, learning_rate=2e-3, lr_schedule="cosine", lr_warmup_steps=100,
                           weight_decay=0.05, adam_beta2=0.98, ema_decay=0.99, checkpoint_steps=100),
    "unet": TrainingConfig(9_000, batch_size=32, learning_rate=1e-3, lr_schedule="cosine", lr_decay_start=0.3,
                           lr_warmup_steps=200, ema_decay=0.999, checkpoint_steps=200),
    "decoder": TrainingConfig(1_600, batch_size=16, learning_rate=1e-3, lr_schedule="cosine", lr_warmup_steps=50,
                              weight_decay=0.0, ema_decay=0.99, checkpoint_steps=200),
}  # fmt: skip


def _rendered(seed: int, split: str) -> np.ndarray:
    return np.asarray(render(sample_scene(seed, split), seed))


def rendered_images(seeds: Sequence[int], split: str = "train") -> torch.Tensor:
    """Renders scenes of a split by their seeds: uint8, (len(seeds), 3, 64, 64)."""
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(partial(_rendered, split=split), seeds, chunksize=256))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def scenes(num_scenes: int, split: str = "train") -> list[Scene]:
    """The scenes that `pictures(range(num_scenes), split)` renders."""
    return [sample_scene(seed, split) for seed in range(num_scenes)]


def run(trainer: Trainer, loss_function, num_examples: int, log_every: int = 20) -> None:
    """Trains to the end, writing the mean losses of every `log_every` steps to log.csv beside the checkpoint."""
    main = trainer.accelerator.is_main_process
    log = CsvLog(trainer.output_dir / "log.csv", trainer.step) if main else None
    sums, started = {}, time.perf_counter()
    for step in trainer.steps(loss_function, num_examples):
        for name, value in step.losses.items():
            sums[name] = sums.get(name, 0) + value / log_every
        if step.step % log_every == 0 and main:
            seconds = (time.perf_counter() - started) / log_every
            row = {"step": step.step, **{k: round(float(v), 5) for k, v in sums.items()}}
            log.append({**row, "learning_rate": step.learning_rate, "seconds_per_step": round(seconds, 3)})
            print("  ".join(f"{k} {v:.5g}" for k, v in log.rows[-1].items()), flush=True)
        if step.step % log_every == 0:
            sums, started = {}, time.perf_counter()
    trainer.save()


def _save_ema(trainer: Trainer, folder: Path) -> None:
    if trainer.accelerator.is_main_process:
        with trainer.ema_weights() as model:
            model.save_pretrained(folder)


def train_vae(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the VAE and sets its scaling factor so that the latents have unit variance."""
    images = rendered_images(range(min(num_scenes, 16_000)))
    torch.manual_seed(config.seed)
    vae = new_vae().to(device)
    trainer = Trainer(vae, config, output_dir / "vae", resume=True)

    def loss_function(model, draw):
        batch = to_unit(images[draw.indices]).to(device)
        return vae_loss(model, batch, draw.normal(LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE).to(device))

    run(trainer, loss_function, len(images))
    with trainer.ema_weights(), torch.no_grad():
        latents = vae.encode(to_unit(images[:512]).to(device)).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        vae.save_pretrained(output_dir / "vae")


def train_clip(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the text and vision towers together and saves them with their tokenizer."""
    drawn, images = scenes(num_scenes), rendered_images(range(num_scenes))
    tokenizer = new_tokenizer([s.caption for s in drawn])
    tokenizer.save_pretrained(output_dir / "clip")
    torch.manual_seed(config.seed)
    trainer = Trainer(new_clip(tokenizer).to(device), config, output_dir / "clip", resume=True)

    def loss_function(model, draw):
        rng = random.Random(f"{draw.seed}-{draw.step}-{draw.positions.start}")
        batch = [drawn[i] for i in draw.indices]
        others = zip(*(hard_negatives(scene, rng) for scene in batch), strict=True)
        captions = [scene.caption for group in (batch, *others) for scene in group]
        numbers = {caption: number for number, caption in enumerate(captions)}
        meaning = torch.tensor([numbers[caption] for caption in captions], device=device)
        tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
        return clip_loss(model, to_clip(images[draw.indices].to(device)), tokens.to(device), meaning)

    run(trainer, loss_function, num_scenes)
    _save_ema(trainer, output_dir / "clip")


@torch.no_grad()
def encode_images(vae: AutoencoderKL, num_scenes: int, device: str = "cpu") -> torch.Tensor:
    """Scaled latents of the first training scenes, (num_scenes, 4, 16, 16); each process encodes its share."""
    vae = vae.to(device).eval()

    def encode(seeds):
        batches = rendered_images(seeds).split(256)
        return torch.cat([vae.encode(to_unit(batch).to(device)).latent_dist.mean for batch in batches])

    return over_processes(encode, num_scenes, device).cpu() * vae.config.scaling_factor


def finetune_decoder(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device="cpu") -> None:
    """Trains the VAE's decoder on, its encoder frozen, so that the U-Net's latents keep their meaning.

    Stable Diffusion's own decoders were improved in this way after the fact; here it sharpens small things.
    """
    num_scenes = min(num_scenes, 8_000)
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    images, latents = (
        rendered_images(range(num_scenes)),
        encode_images(vae, num_scenes, device) / vae.config.scaling_factor,
    )
    trainer = Trainer(vae, config, output_dir / "decoder", resume=True)

    def loss_function(model, draw):
        return decoder_loss(model, latents[draw.indices].to(device), to_unit(images[draw.indices]).to(device))

    run(trainer, loss_function, num_scenes)
    _save_ema(trainer, output_dir / "decoder")


def train_unet(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the U-Net on the VAE's latents and the frozen text encoder; one caption in ten is empty."""
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "clip")
    text_encoder = CLIPTextModel.from_pretrained(output_dir / "clip").to(device).eval()
    latents = encode_images(AutoencoderKL.from_pretrained(output_dir / "vae"), num_scenes, device)
    captions = [scene.caption for scene in scenes(num_scenes)]
    tokens = tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids
    scheduler = DDPMScheduler(**SCHEDULE)
    torch.manual_seed(config.seed)
    unet = new_unet().to(device, memory_format=torch.channels_last)
    trainer = Trainer(unet, config, output_dir / "unet", resume=True)

    def loss_function(model, draw):
        indices = torch.tensor(draw.indices)
        caption_indices = indices.where(draw.uniform() >= 0.1, torch.tensor(num_scenes))
        with torch.no_grad():
            hidden_states = text_encoder(tokens[caption_indices].to(device)).last_hidden_state
        return unet_loss(model, scheduler, latents[indices].to(device), hidden_states, draw)

    run(trainer, loss_function, num_scenes)
    _save_ema(trainer, output_dir / "unet")


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
    """Writes teacher/ (the pipeline), clip/ (the judge) and logs/ in the form that data/storybook/ is committed in.

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
def reconstruction_psnr(vae: AutoencoderKL, num_images: int = 256) -> float:
    """Mean PSNR in dB over held-out pictures that went through the VAE and back."""
    images = to_unit(rendered_images(range(num_images), "test")).to(vae.device)
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3)))).mean().item()


def score(folder: Path, num_images: int = 256, device: str = "cpu") -> None:
    """Writes scores.json: how good the teacher in `folder` is on held-out captions, beside real renders of the same."""
    places = {"teacher": str(folder / "teacher"), "judge": str(folder / "clip")}
    settings = find_preset("storybook", num_images=num_images, **places)
    scorer, made = Scorer(settings, device), load_pipeline(settings.teacher, device)
    real = [render(scene, seed) for seed, scene in enumerate(scorer.scenes)]
    scores = {
        "num_images": num_images, "num_inference_steps": settings.num_inference_steps, "seed": scorer.seed,
        "guidance_scale": settings.guidance_scale, "psnr": round(reconstruction_psnr(made.vae), 2),
        "real": scorer.scores(real), "teacher": scorer.scores(scorer.draw(made)),
    }  # fmt: skip
    write_json(folder / "scores.json", scores)
    print(json.dumps(scores, indent=1))


def main() -> None:
    """Command line: the stages to run, in order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "export"])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/00_storybook_world/teacher"))
    parser.add_argument("--destination", type=Path, default=Path("data/storybook"), help="where export writes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-train-steps", type=int)
    arguments = parser.parse_args()
    changes = {k: v for k in ("batch_size", "max_train_steps") if (v := getattr(arguments, k))}
    for stage in arguments.stages:
        if stage == "export":
            export(arguments.output_dir, arguments.destination)
            score(arguments.destination, device=arguments.device)
        else:
            STAGES[stage](arguments.output_dir, replace(CONFIGS[stage], **changes), device=arguments.device)


if __name__ == "__main__":
    main()
