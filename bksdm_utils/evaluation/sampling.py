"""Prompts to images in memory (notebooks 04 to 06).

Each image has its own seed; on a CPU it is the same bit for bit whatever the batch size, order and number of threads.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import PNDMScheduler
from PIL import Image

from ..config.evaluation import FolderSampling
from ..files import in_threads
from ..models.pipelines import Pipeline, for_one_thread, with_scheduler


def image_seed(seed: int, image: int | str) -> int:
    """The seed of one image's noise, a function of the run's seed and the image's number or id."""
    if isinstance(image, str):
        image = int.from_bytes(hashlib.sha256(image.encode()).digest()[:8], "big")
    high, low = np.random.SeedSequence((seed, image)).generate_state(2)
    return int(high) << 32 | int(low)


def generate(pipeline: Pipeline, captions: Sequence[str], **sampling) -> list[Image.Image]:
    """One image for each caption; image i starts from the noise of `image_seed(seed, i)`.

    Args:
        sampling: fields of `FolderSampling`.
    """
    config = FolderSampling(**sampling)
    seeds = [image_seed(config.seed, i) for i in range(len(captions))]
    return [image for images in sample_batches(pipeline, captions, seeds, config) for image in images]


def sample_batches(
    pipeline: Pipeline, captions: Sequence[str], seeds: Sequence[int], sampling: FolderSampling
) -> Iterator[list[Image.Image]]:
    """One image for each caption from the noise of its seed, pass by pass, in order.

    The next pass is computed while the caller works on the last one. Kernels may round differently for another number
    of images or threads. So on a CPU every pass has the same number of images, padded at the end, and one thread;
    several threads compute several passes. A GPU takes `sampling.batch_size` and guarantees the same noise only.
    """
    check_steps(pipeline, sampling)
    pipeline = with_scheduler(pipeline, sampling.scheduler)
    size, workers = _pass_size(pipeline, sampling)
    copies = queue.SimpleQueue()
    for _ in range(workers):
        copies.put(for_one_thread(pipeline))

    def one_pass(start: int) -> list[Image.Image]:
        own, chosen = copies.get(), slice(start, start + size)
        try:
            return _sample_pass(own, captions[chosen], seeds[chosen], sampling, size)
        finally:
            copies.put(own)

    with _sampling_mode(pipeline):
        yield from in_threads(one_pass, range(0, len(captions), size), ahead=workers, workers=workers)


def check_steps(pipeline: Pipeline, sampling: FolderSampling) -> None:
    """Raises ValueError for fewer steps than the scheduler can do."""
    scheduler = with_scheduler(pipeline, sampling.scheduler).scheduler
    if isinstance(scheduler, PNDMScheduler) and sampling.num_inference_steps < 4:
        raise ValueError(f"num_inference_steps is {sampling.num_inference_steps}: expected 4 or more, as PNDM needs")


def _pass_size(pipeline: Pipeline, sampling: FolderSampling) -> tuple[int, int]:
    """Images in a pass, and how many passes are computed at once."""
    if pipeline.device.type != "cpu":
        return sampling.batch_size, 1
    side = (sampling.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor) // pipeline.vae_scale_factor
    return (8 if side <= 32 else 1), torch.get_num_threads()  # one large image or 8 small ones occupy a core


@contextmanager
def _sampling_mode(pipeline: Pipeline) -> Iterator[None]:
    """Within the block the U-Net is in evaluation mode, and on a CPU each operation has one thread."""
    threads, training = torch.get_num_threads(), pipeline.unet.training
    if pipeline.device.type == "cpu":
        torch.set_num_threads(1)
    pipeline.unet.eval()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        pipeline.unet.train(training)


@torch.no_grad()
def _sample_pass(
    pipeline: Pipeline, captions: Sequence[str], seeds: Sequence[int], sampling: FolderSampling, size: int
) -> list[Image.Image]:
    padded = [*captions, *captions[-1:] * (size - len(captions))]
    generators = [torch.Generator().manual_seed(s) for s in (*seeds, *seeds[-1:] * (size - len(seeds)))]
    # A U-Net in training has full-precision weights, beside parts that may have half.
    types = {part.dtype for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)}
    half = next(iter(types - {torch.float32}), None)
    with torch.autocast(pipeline.device.type, half, enabled=len(types) > 1):
        images = pipeline(
            padded, generator=generators, num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale, height=sampling.size, width=sampling.size,
        ).images  # fmt: skip
    return images[: len(captions)]
