"""Images and captions as the U-Net takes them: latents and token ids (notebooks 01, 02, 03)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from ..core.families import TextConditioning
from ..data.images import to_pixels


def crop_centres(name: str, count: int) -> list[tuple[float, float]]:
    """Where an image is cropped, as `to_pixels` takes it: the middle, or `count` positions that follow from its name.

    They follow from nothing else, so that runs of any seed share what was encoded.
    """
    if not count:
        return [(0.5, 0.5)]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    return [(float(x), float(y)) for x, y in rng.random((count, 2))]


def encoding_batch(resolution: int) -> int:
    """Images that the VAE encodes at once: a few GB of activations."""
    return min(32, max(1, 4 * 512**2 // resolution**2))


def posterior(pipeline: DiffusionPipeline, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (B, 4, h, w) of images (B, 3, H, W) in the VAE's scaled latents, fp32."""
    vae = pipeline.vae
    moments, factor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist, vae.config.scaling_factor
    return moments.mean.float() * factor, moments.std.float() * factor


def tokenizers(pipeline: DiffusionPipeline) -> list:
    """The pipeline's one tokenizer, SDXL's two."""
    named = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [tokenizer for tokenizer in named if tokenizer is not None]


def token_ids(pipeline: DiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Captions as the pipeline's text encoder takes them, (N, T); for SDXL's two text encoders (N, 2, T)."""
    ids = [
        tokenizer(list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                  return_tensors="pt").input_ids
        for tokenizer in tokenizers(pipeline)
    ]  # fmt: skip
    return ids[0] if len(ids) == 1 else torch.stack(ids, 1)


@torch.no_grad()
def probe_inputs(
    pipeline: DiffusionPipeline, images: Sequence[Image.Image], captions: Sequence[str], seed: int = 0,
    timesteps: Sequence[int] = (100, 300, 500, 700, 900),
) -> list[dict]:  # fmt: skip
    """U-Net kwargs to compare networks on: images as latents, each noised to every timestep, with its caption."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    latents, _ = posterior(pipeline, torch.stack([to_pixels(image, side) for image in images]))
    condition = TextConditioning(pipeline)(token_ids(pipeline, captions).to(latents.device))
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    generator, inputs = torch.Generator().manual_seed(seed), []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps = torch.full((len(latents),), timestep, device=latents.device)
        inputs.append({"sample": schedule.add_noise(latents, noise, steps), "timestep": steps, **condition})
    return inputs
