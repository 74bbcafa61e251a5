"""One request for images, checked and sampled: what the demo page and notebook 06 share."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, PNDMScheduler
from PIL import Image
from pydantic import ConfigDict, Field

from ..config.base import Config, Positive, Seed, Share, parameter
from ..config.deploy import Demo
from ..config.training import Side
from ..costs.counting import count
from ..data.images import to_pixels
from ..evaluation.sampling import image_seed
from ..models.pipelines import Pipeline, for_one_thread
from ..models.schedulers import with_scheduler

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's others include PostScript, which is a program


class Request(Config):
    """What is sampled; the images are a function of this and of the model."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    prompt: str = parameter("", "what the images show")
    negative_prompt: str = parameter("", "what they should not show")
    seed: Seed = parameter(0, "of the noise")
    steps: Annotated[int, Field(ge=4)] = parameter(25, "denoising steps; PNDM needs 4")
    guidance: Annotated[float, Field(ge=0, le=30)] = parameter(7.5, "strength of classifier-free guidance")
    images: Positive = parameter(1, "how many")
    size: Side | None = parameter(None, "pixels a side; None is what the U-Net was trained for")
    image: Image.Image | None = parameter(None, "image to start from; None starts from noise")
    strength: Share = parameter(0.6, "how much of that image is replaced")


def check(request: Request, limits: Demo) -> None:
    """Raises ValueError for a request beyond the limits, or one that cannot be sampled."""
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name)
        if len(text) > limits.max_prompt:
            raise ValueError(f"{name} has {len(text):,} characters: expected at most {limits.max_prompt:,}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} holds half a character, which no tokenizer takes: type it again")
    for name in ("steps", "images", "size"):
        value, most = getattr(request, name), getattr(limits, f"max_{name}")
        if value and most and value > most:
            raise ValueError(f"{name} is {value}: expected at most {most}")
    if request.image is not None:
        check_upload(request.image, limits)
        if int(request.steps * request.strength) < 1:  # as diffusers counts
            raise ValueError(f"strength {request.strength} of {request.steps} steps leaves none: expected "
                             f"{1 / request.steps:.2g} or more")  # fmt: skip


def open_upload(path: str | Path) -> Image.Image:
    """An image file of a common format, not decoded yet.

    Raises:
        ValueError: it is no image, or a bomb: a small file that decodes to gigabytes.
    """
    try:
        return Image.open(path, formats=FORMATS)
    except Exception as error:  # Pillow has several classes for unknown formats, broken headers and bombs
        raise ValueError(f"the file is no image that can be read: expected {', '.join(FORMATS)}") from error


def check_upload(image: Image.Image, limits: Demo) -> None:
    """Raises ValueError for an image that is too large, which is known before it is decoded, or cannot be decoded."""
    width, height = image.size
    if width * height > limits.max_megapixels * 1e6:
        raise ValueError(f"the image has {width:,} x {height:,} pixels: expected at most {limits.max_megapixels:g} "
                         "megapixels")  # fmt: skip
    try:
        to_pixels(image, 8)
    except Exception as error:  # each decoder has its own classes
        raise ValueError("the image is damaged or ends early: save it again") from error


def own_size(pipeline: Pipeline) -> int:
    """Pixels a side of the images that the U-Net was trained for."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def generate_request(
    pipeline: Pipeline, request: Request, step: Callable[[int, int], None] | None = None
) -> tuple[list[Image.Image], float]:
    """Samples a checked request; several threads may call it at once with the same pipeline.

    Args:
        step: called with (done, total) after each denoising step; an exception of it ends the sampling.

    Returns:
        the images, number i from the noise of `image_seed(seed, i)`, and the seconds they took.
    """
    total, side = evaluations(pipeline, request), request.size or own_size(pipeline)
    own, size = own_pipeline(pipeline, request), {"height": side, "width": side}
    if request.image is not None:
        start = (to_pixels(request.image, side) + 1) / 2  # diffusers takes values from 0 to 1
        size = {"image": start.expand(request.images, -1, -1, -1), "strength": request.strength}

    def after(_, index: int, timestep: int, kwargs: dict) -> dict:
        if step is not None:
            step(index + 1, total)
        return kwargs

    generators = [torch.Generator().manual_seed(image_seed(request.seed, i)) for i in range(request.images)]
    started = time.perf_counter()
    images = own(
        [request.prompt] * request.images, negative_prompt=[request.negative_prompt] * request.images,
        generator=generators, num_inference_steps=request.steps, guidance_scale=request.guidance,
        callback_on_step_end=after, **size,
    ).images  # fmt: skip
    return images, time.perf_counter() - started


def own_pipeline(pipeline: Pipeline, request: Request) -> DiffusionPipeline:
    """A pipeline with the same weights for one request: text to image, or image to image."""
    own = for_one_thread(pipeline)
    own.scheduler = _scheduler(pipeline, request)
    if request.image is not None:
        own = AutoPipelineForImage2Image.from_pipe(own)
        own.set_progress_bar_config(disable=True)
    return own


def _scheduler(pipeline: Pipeline, request: Request):
    if request.image is not None and isinstance(pipeline.scheduler, PNDMScheduler):
        # PNDM takes its first timestep twice: begun in the middle it runs one step behind, and noise stays.
        return with_scheduler(pipeline, "dpm++").scheduler
    return copy.deepcopy(pipeline.scheduler)


def evaluations(pipeline: Pipeline, request: Request) -> int:
    """How often the U-Net is called for a request: with PNDM once more than there are steps."""
    scheduler = _scheduler(pipeline, request)
    scheduler.set_timesteps(request.steps)
    kept = request.steps if request.image is None else min(int(request.steps * request.strength), request.steps)
    return len(scheduler.timesteps) - (request.steps - kept) * scheduler.order


def macs(pipeline: Pipeline, request: Request) -> int:
    """Multiply-accumulates of the U-Net for a whole request, in the paper's convention; guidance doubles them."""
    side = (request.size or own_size(pipeline)) // pipeline.vae_scale_factor
    once = _macs_once(json.dumps(dict(pipeline.unet.config), default=str), side)
    return once * evaluations(pipeline, request) * request.images * (2 if request.guidance > 1 else 1)


@lru_cache(maxsize=64)
def _macs_once(config: str, side: int) -> int:
    return count(json.loads(config), side).macs


def cut_off(pipeline: Pipeline, text: str) -> str:
    """The end of a text beyond the text encoder's maximum length, or nothing."""
    ids, most = pipeline.tokenizer(text).input_ids, pipeline.tokenizer.model_max_length
    return pipeline.tokenizer.decode(ids[most - 1 : -1]) if len(ids) > most else ""


def cost(pipeline: Pipeline, request: Request, seconds: float) -> str:
    """Seconds and multiply-accumulates of a request in a few words."""
    return f"{seconds:.1f} s, {macs(pipeline, request) / 1e9:,.3g} G MACs"


def side_by_side(models: Mapping[str, Pipeline], request: Request) -> dict[str, list[Image.Image]]:
    """A row of images for each model, named by model and cost; the request is checked first."""
    check(request, Demo())
    results = {name: generate_request(model, request) for name, model in models.items()}
    return {f"{name}\n{cost(models[name], request, seconds)}": images for name, (images, seconds) in results.items()}


def by_strength(models: Mapping[str, Pipeline], request: Request, strengths: Sequence[float]) -> dict[str, list]:
    """The image that a request starts from, and a row for each model of its first image at each strength."""
    rows = {"start": [request.image.convert("RGB")] * len(strengths)}
    requests = [request.but(strength=strength) for strength in strengths]
    for each in requests:
        check(each, Demo())
    return rows | {name: [generate_request(model, each)[0][0] for each in requests] for name, model in models.items()}
