"""Prompts to images in memory (notebook 04).

Each image has a seed of its own, and on a CPU it comes out the same bit for bit whatever the batch size, the order,
and the number of threads.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from PIL import Image

from ..files import in_threads
from ..models.pipelines import Pipeline, for_one_thread
from ..models.schedulers import SCHEDULERS, with_scheduler

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}


def image_seed(seed: int, picture: int | str) -> int:
    """The seed of one picture, a function of the run's seed and the picture's number or id."""
    if isinstance(picture, str):
        picture = int.from_bytes(hashlib.sha256(picture.encode()).digest()[:8], "big")
    high, low = np.random.SeedSequence((seed, picture)).generate_state(2)
    return int(high) << 32 | int(low)


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        scheduler: one of `SCHEDULERS`; None is the pipeline's own.
        size: pixels a side; None is what the U-Net was trained for.
        image_format: of pictures in a folder: png, or jpeg of quality 75 as in the paper.
        batch_size: pictures in one pass on a GPU; a CPU's passes have a fixed size, for the sake of equal bits.
    """

    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    size: int | None = None
    image_format: str = "png"
    batch_size: int = 16

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}: expected 1 or more, 4 with PNDM")
        if self.batch_size < 1 or self.guidance_scale < 0 or self.seed < 0:
            raise ValueError(f"{self}: expected a batch_size of 1 or more, guidance_scale and seed of 0 or more")
        if self.scheduler not in (None, *SCHEDULERS):
            raise ValueError(f"unknown scheduler {self.scheduler!r}: expected one of {', '.join(SCHEDULERS)}")
        object.__setattr__(self, "guidance_scale", float(self.guidance_scale))  # 4 and 4.0 are one setting
        if self.image_format not in SUFFIXES:
            raise ValueError(f"unknown image_format {self.image_format!r}: expected one of {', '.join(SUFFIXES)}")
        if self.size is not None and (self.size < 8 or self.size % 8):
            raise ValueError(f"size is {self.size}: expected a multiple of 8 pixels")


def sample_batches(
    pipeline: Pipeline, captions: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> Iterator[list[Image.Image]]:
    """One picture for each caption from the noise of its seed, pass by pass, in order.

    The next pass is computed while the caller works on the last one. Kernels may round differently for another number
    of pictures or threads. So on a CPU every pass has the same number of pictures, filled up at the end, and one
    thread; several threads work on several passes. A GPU takes `sampling.batch_size` and promises the same noise only.
    """
    check_steps(pipeline, sampling)
    pipeline = with_scheduler(pipeline, sampling.scheduler)
    size, workers = _passes(pipeline, sampling)
    crew = queue.SimpleQueue()
    for _ in range(workers):
        crew.put(for_one_thread(pipeline))

    def one_pass(start: int) -> list[Image.Image]:
        member = crew.get()
        try:
            return _sample_pass(member, captions[start : start + size], seeds[start : start + size], sampling, size)
        finally:
            crew.put(member)

    with _single_threaded(pipeline.device.type == "cpu"), _evaluating(pipeline.unet):
        yield from in_threads(one_pass, range(0, len(captions), size), ahead=workers, workers=workers)


def check_steps(pipeline: Pipeline, sampling: Sampling) -> None:
    """Raises ValueError for fewer steps than the scheduler in force can do."""
    scheduler = with_scheduler(pipeline, sampling.scheduler).scheduler
    if isinstance(scheduler, PNDMScheduler) and sampling.num_inference_steps < 4:
        raise ValueError(f"num_inference_steps is {sampling.num_inference_steps}: expected 4 or more, as PNDM needs")


def _passes(pipeline: Pipeline, sampling: Sampling) -> tuple[int, int]:
    """Pictures in a pass, and how many passes are computed at once."""
    if pipeline.device.type != "cpu":
        return sampling.batch_size, 1
    side = (sampling.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor) // pipeline.vae_scale_factor
    return (8 if side <= 32 else 1), torch.get_num_threads()  # 8 small ones fill a core; a large one does alone


@contextmanager
def _single_threaded(wanted: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(unet: UNet2DConditionModel) -> Iterator[None]:
    was_training = unet.training
    unet.eval()
    try:
        yield
    finally:
        unet.train(was_training)


@torch.no_grad()
def _sample_pass(
    pipeline: Pipeline, captions: Sequence[str], seeds: Sequence[int], sampling: Sampling, size: int
) -> list[Image.Image]:
    filled = [*captions, *captions[-1:] * (size - len(captions))]
    generators = [torch.Generator().manual_seed(s) for s in (*seeds, *seeds[-1:] * (size - len(seeds)))]
    # What is in training has full-precision weights, among parts that may have half.
    types = {part.dtype for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)}
    half = next(iter(types - {torch.float32}), None)
    with torch.autocast(pipeline.device.type, half, enabled=len(types) > 1):
        pictures = pipeline(
            filled, generator=generators, num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale, height=sampling.size, width=sampling.size,
        ).images  # fmt: skip
    return pictures[: len(captions)]


def generate(pipeline: Pipeline, captions: Sequence[str], **sampling) -> list[Image.Image]:
    """One picture for each caption, in memory; picture i starts from the noise of `picture_seed(seed, i)`.

    Args:
        sampling: as `Sampling` takes it.
    """
    settings = Sampling(**sampling)
    seeds = [image_seed(settings.seed, i) for i in range(len(captions))]
    return [picture for pictures in sample_batches(pipeline, captions, seeds, settings) for picture in pictures]
