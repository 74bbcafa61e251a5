"""Prompts to images in memory (notebooks 04 to 06).

Each image has its own seed; on a CPU it is the same bit for bit whatever the batch size, order and number of threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..config.evaluation import FolderSampling
from ..files import in_threads
from ..models.devices import memory_advice, to_device
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

    Raises:
        RuntimeError: a GPU's memory did not suffice.
    """
    check_steps(pipeline, sampling)
    pipeline = with_scheduler(pipeline, sampling.scheduler)
    size, workers, threads = sampling.batch_size, 1, torch.get_num_threads()
    if on_cpu := pipeline.device.type == "cpu":  # one large image or 8 small ones occupy a core
        pixels = sampling.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        size, workers = 8 if pixels // pipeline.vae_scale_factor <= 32 else 1, threads
    copies, own = [for_one_thread(pipeline) for _ in range(workers)], threading.local()

    def one_pass(start: int) -> list[Image.Image]:
        if not hasattr(own, "pipeline"):
            own.pipeline = copies.pop()
        chosen = slice(start, start + size)
        return _sample_pass(own.pipeline, captions[chosen], seeds[chosen], sampling, size if on_cpu else 0)

    torch.set_num_threads(1 if on_cpu else threads)
    try:
        with _for_sampling(pipeline):
            yield from in_threads(one_pass, range(0, len(captions), size), ahead=workers, workers=workers)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _for_sampling(pipeline: Pipeline) -> Iterator[None]:
    """Within the block nothing drops out, and a GPU decodes images one by one: a whole batch needs more memory."""
    training = pipeline.unet.training
    pipeline.unet.eval()
    pipeline.vae.use_slicing = pipeline.device.type != "cpu"
    try:
        yield
    finally:
        pipeline.vae.use_slicing = False  # which would also encode images one by one
        pipeline.unet.train(training)


def sample_running(
    pipeline: Pipeline, captions: Sequence[str], wanted: Sequence[bool], sampling: FolderSampling
) -> Iterator[tuple[slice, list[Image.Image]]]:
    """Passes of `batch_size` captions with at least one wanted, their noise from one running generator.

    So BK-SDM evaluates, with seed 1234; on a GPU, where a generator fills a batch in another order than its images one
    by one, an image then depends on the batch size. Unwanted passes are drawn, so that the others keep their noise.
    """
    pipeline = with_scheduler(pipeline, sampling.scheduler)
    generator = torch.Generator(pipeline.device).manual_seed(sampling.seed)
    side = (sampling.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor) // pipeline.vae_scale_factor
    shape = pipeline.unet.config.in_channels, side, side
    with _for_sampling(pipeline):
        for start in range(0, len(captions), sampling.batch_size):
            chosen = slice(start, min(start + sampling.batch_size, len(captions)))
            size = (chosen.stop - start, *shape)
            latents = randn_tensor(size, generator, pipeline.device, pipeline.text_encoder.dtype)
            if any(wanted[chosen]):
                yield chosen, _sample_pass(pipeline, captions[chosen], latents, sampling)


def check_steps(pipeline: Pipeline, sampling: FolderSampling) -> None:
    """Raises ValueError for fewer steps than the scheduler can do."""
    scheduler = with_scheduler(pipeline, sampling.scheduler).scheduler
    if isinstance(scheduler, PNDMScheduler) and sampling.num_inference_steps < 4:
        raise ValueError(f"num_inference_steps is {sampling.num_inference_steps}: expected 4 or more, as PNDM needs")


@torch.no_grad()
def _sample_pass(
    pipeline: Pipeline,
    captions: Sequence[str],
    noise: Sequence[int] | torch.Tensor,
    sampling: FolderSampling,
    size: int = 0,
) -> list[Image.Image]:
    """Images of the captions from seeds, the batch filled up to `size`, or from latents."""
    padded = [*captions, *captions[-1:] * (size - len(captions))]
    if isinstance(noise, torch.Tensor):
        start = {"latents": noise}
    else:
        seeds = (*noise, *noise[-1:] * (size - len(noise)))
        start = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    # A U-Net in training has full-precision weights, beside parts that may have half.
    types = {part.dtype for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)}
    half = next(iter(types - {torch.float32}), None)
    autocast = torch.autocast(pipeline.device.type, half, enabled=len(types) > 1)
    advice = memory_advice(f"sampling {len(captions)} images at once", "a smaller batch_size or sampling_batch_size",
                           "fewer pixels (size)", "nothing else on this GPU")  # fmt: skip
    with autocast, advice, _timesteps_on_the_cpu(pipeline):
        images = pipeline(
            padded, **start, num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale, height=sampling.size, width=sampling.size,
        ).images  # fmt: skip
    return images[: len(captions)]


@contextmanager
def _timesteps_on_the_cpu(pipeline: Pipeline) -> Iterator[None]:
    """Within the block the scheduler, which is this thread's own, reads its timesteps without waiting for a GPU."""
    if pipeline.device.type != "cuda":
        yield
        return
    scheduler = pipeline.scheduler
    scheduler.set_timesteps = lambda *args, device=None, **kwargs: type(scheduler).set_timesteps(
        scheduler, *args, device="cpu", **kwargs
    )

    def moved(_unet, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args[0], to_device(args[1], args[0].device), *args[2:]), kwargs

    hook = pipeline.unet.register_forward_pre_hook(moved, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        del scheduler.set_timesteps
