"""One request for images: what the demo page and notebook 06 share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, BinaryIO

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from ..config.base import Config, Positive, Seed, Share, parameter
from ..config.deploy import Demo
from ..config.training import Side
from ..costs.counting import count
from ..data.images import to_pixels
from ..evaluation.sampling import image_seed
from ..models.pipelines import Pipeline, for_one_thread, with_scheduler

DEFAULTS = Demo()
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

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        (self.prompt + self.negative_prompt).encode()  # refuses half a character, which no tokenizer takes
        if self.image is not None and int(self.steps * self.strength) < 1:  # as diffusers counts
            raise ValueError(f"strength {self.strength} of {self.steps} steps leaves none: expected "
                             f"{1 / self.steps:.2g} or more")  # fmt: skip
        return self


def open_upload(file: str | Path | BinaryIO, max_megapixels: float = DEFAULTS.max_megapixels) -> Image.Image:
    """An image file of a common format.

    Raises:
        ValueError: it is no image, incomplete, or too large, which is known before it is decoded.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        too_large = image.width * image.height > max_megapixels * 1e6
        if not too_large:
            image.load()
    except Exception as error:  # Pillow and its decoders have many classes
        raise ValueError(f"the file is no whole image: expected {', '.join(FORMATS)}") from error
    if too_large:
        raise ValueError(f"the image has {image.width:,} x {image.height:,} pixels: expected at most "
                         f"{max_megapixels:g} megapixels")  # fmt: skip
    return image


def own_size(pipeline: Pipeline) -> int:
    """Pixels a side of the images that the U-Net was trained for."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def generate_request(
    pipeline: Pipeline, request: Request, step: Callable[[int, int], None] | None = None
) -> tuple[list[Image.Image], str]:
    """Samples a request; several threads may call it at once with the same pipeline.

    Args:
        step: called with (done, total) after each denoising step; an exception of it ends the sampling.

    Returns:
        the images, number i from the noise of `image_seed(seed, i)`, and what they cost: seconds and the U-Net's
        multiply-accumulates, in the paper's convention.
    """
    own, side = own_pipeline(pipeline, request), request.size or own_size(pipeline)
    size = {"height": side, "width": side}
    if request.image is not None:
        start = (to_pixels(request.image, side) + 1) / 2  # diffusers takes values from 0 to 1
        size = {"image": start.expand(request.images, -1, -1, -1), "strength": request.strength}

    def after(_, index: int, timestep: int, kwargs: dict) -> dict:
        if step is not None:
            step(index + 1, own.num_timesteps)
        return kwargs

    generators = [torch.Generator().manual_seed(image_seed(request.seed, i)) for i in range(request.images)]
    started = time.perf_counter()
    images = own(
        [request.prompt] * request.images, negative_prompt=[request.negative_prompt] * request.images,
        generator=generators, num_inference_steps=request.steps, guidance_scale=request.guidance,
        callback_on_step_end=after, **size,
    ).images  # fmt: skip
    seconds, passes = time.perf_counter() - started, own.num_timesteps * request.images * (1 + (request.guidance > 1))
    macs = passes * _macs(pipeline.unet, side // pipeline.vae_scale_factor)
    return images, f"{seconds:.1f} s, {macs / 1e9:,.3g} G MACs"


@lru_cache(maxsize=64)
def _macs(unet: UNet2DConditionModel, side: int) -> int:
    return count(unet, side).macs


def own_pipeline(pipeline: Pipeline, request: Request) -> DiffusionPipeline:
    """A pipeline with the same weights for one request: text to image, or image to image."""
    own = for_one_thread(pipeline)
    if request.image is not None:
        if isinstance(own.scheduler, PNDMScheduler):
            # PNDM takes its first timestep twice: begun in the middle it runs one step behind, and noise stays.
            own = with_scheduler(own, "dpm++")
        own = AutoPipelineForImage2Image.from_pipe(own)
        own.set_progress_bar_config(disable=True)
    return own


def side_by_side(models: Mapping[str, Pipeline], request: Request) -> dict[str, list[Image.Image]]:
    """A row of images for each model, named by model and cost."""
    results = {name: generate_request(model, request) for name, model in models.items()}
    return {f"{name}\n{cost}": images for name, (images, cost) in results.items()}


def by_strength(models: Mapping[str, Pipeline], request: Request, strengths: Sequence[float]) -> dict[str, list]:
    """The image that a request starts from, and a row for each model of its first image at each strength."""
    requests = [request.but(strength=strength) for strength in strengths]
    rows = {name: [generate_request(model, each)[0][0] for each in requests] for name, model in models.items()}
    return {"start": [request.image.convert("RGB")] * len(strengths), **rows}
