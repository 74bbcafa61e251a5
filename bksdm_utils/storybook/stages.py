"""What the stages of the storybook teacher's making share: renders, encodings and the training loop (notebook 00)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..config.training import Training
from ..data.rendering import render
from ..data.scenes import WORLD, Scene, World, sample_scene
from ..files import CsvLog
from ..training.rng import BatchRng
from ..training.trainer import LossFunction, Trainer
from .networks import to_unit


def _rendered(seed: int, split: str, world: World) -> np.ndarray:
    return np.asarray(render(sample_scene(seed, split, world.pair_share), seed, world.size))


def rendered_images(seeds: Sequence[int], split: str = "train", world: World = WORLD) -> torch.Tensor:
    """Renders scenes of a split by their seeds: uint8, (len(seeds), 3, world.size, world.size)."""
    with ProcessPoolExecutor() as pool:
        images = list(pool.map(partial(_rendered, split=split, world=world), seeds, chunksize=256))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def scenes(num_scenes: int, split: str = "train", world: World = WORLD) -> list[Scene]:
    """The scenes that `rendered_images(range(num_scenes), split, world)` renders."""
    return [sample_scene(seed, split, world.pair_share) for seed in range(num_scenes)]


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


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents of uint8 images, (N, 4, 16, 16), unscaled, on the CPU."""
    batches = (to_unit(batch).to(vae.device) for batch in images.split(256))
    return torch.cat([vae.encode(batch).latent_dist.mean.cpu() for batch in batches])


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images in -1 … 1, encoded and decoded."""
    return vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)


@torch.no_grad()
def encode_captions(tokenizer: Path, text_encoder: Path, captions: Sequence[str], device: str = "cpu") -> torch.Tensor:
    """Hidden states of captions, (N, MAX_TOKENS, 96), on the CPU, by a tokenizer and a text encoder in folders."""
    encoder = CLIPTextModel.from_pretrained(text_encoder, torch_dtype=torch.float32).to(device).eval()
    tokenize = CLIPTokenizer.from_pretrained(tokenizer)
    tokens = tokenize(list(captions), padding="max_length", return_tensors="pt").input_ids
    return torch.cat([encoder(part.to(device)).last_hidden_state.cpu() for part in tokens.split(256)])
