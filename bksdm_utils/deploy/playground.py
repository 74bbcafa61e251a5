"""One request for images, checked and sampled: what the demo page and notebook 06 share."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image

from ..costs.counting import count
from ..data.images import to_pixels
from ..evaluation.sampling import Sampling, image_seed
from ..models.pipelines import Pipeline, for_one_thread
from ..models.schedulers import with_scheduler

FEWEST_STEPS = 4  # PNDM needs them


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's others include PostScript, which is a program


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        prompt: characters.
        size: pixels a side of what is drawn; None is twice the first model's own.
        megapixels: of a picture to start from.
        waiting: requests in the queue; the next one is told that we are busy.
    """

    prompt: int = 1000
    steps: int = 50
    size: int | None = None
    pictures: int = 4
    megapixels: float = 25.0
    waiting: int = 20

    def __post_init__(self):
        for name, least in {"prompt": 1, "steps": FEWEST_STEPS, "size": 8, "pictures": 1, "waiting": 1}.items():
            if (most := getattr(self, name)) is not None and most < least:
                raise ValueError(f"a limit of {most} {name} lets nobody draw: expected {least} or more")

    def for_model(self, pipeline: Pipeline) -> Limits:
        """These limits with a size that suits the model where none is set."""
        return self if self.size else replace(self, size=2 * own_size(pipeline))


@dataclass(frozen=True)
class Request:
    """What shall be drawn; the pictures are a function of this and of the model.

    Attributes:
        size: pixels a side; None is what the U-Net was trained for.
        picture: a picture to start from; None starts from noise alone.
        strength: how much of the picture is drawn anew, 0 … 1; without a picture it means nothing.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    pictures: int = 1
    size: int | None = None
    picture: Image.Image | None = None
    strength: float = 0.6


def check(request: Request, limits: Limits) -> None:
    """Raises ValueError, saying what was expected, for a request beyond the limits or one that cannot be drawn."""
    _check_text("prompt", request.prompt, limits.prompt)
    _check_text("negative prompt", request.negative_prompt, limits.prompt)
    ranges = {"seed": (0, 2**63 - 1), "steps": (FEWEST_STEPS, limits.steps), "guidance": (0.0, 30.0),
              "pictures": (1, limits.pictures), "strength": (0.0, 1.0)}  # fmt: skip
    for name, (low, high) in ranges.items():
        _check_number(name, getattr(request, name), low, high)
    if request.size is not None:
        _check_number("size", request.size, 8, limits.size or math.inf)
    Sampling(request.seed, request.steps, request.guidance, size=request.size)  # has rules of its own
    if request.picture is not None:
        check_upload(request.picture, limits)
        if int(request.steps * request.strength) < 1:  # as diffusers counts
            raise ValueError(f"strength {request.strength} of {request.steps} steps leaves none to draw: expected a "
                             f"strength of {1 / request.steps:.2g} or more")  # fmt: skip


def _check_text(name: str, text: object, most: int) -> None:
    if not isinstance(text, str):
        raise ValueError(f"the {name} is {type(text).__name__}: expected text")
    if len(text) > most:
        raise ValueError(f"the {name} has {len(text):,} characters: expected at most {most:,}. Shorten it")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the {name} holds half a character, which no tokenizer takes: type it again")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    kinds, what = (int, "a whole number") if isinstance(low, int) else ((int, float), "a number")
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:  # NaN is in no range
        raise ValueError(f"{name} is {str(value)[:40]}: expected {what} from {low:g} to {high:,}")


def open_upload(path: str | Path) -> Image.Image:
    """A picture's file of a common format, of which nothing is decoded yet.

    Raises:
        ValueError: it is no picture, or a bomb: a small file that unpacks to gigabytes.
    """
    try:
        return Image.open(path, formats=FORMATS)
    except Exception as error:  # an unknown format, a broken header, a bomb: each has a class of its own
        raise ValueError(f"this file is no picture that can be read: expected {', '.join(FORMATS)}") from error


def check_upload(picture: Image.Image, limits: Limits) -> None:
    """Raises ValueError for a picture that is too large (seen before it is decoded) or cannot be decoded."""
    width, height = picture.size
    if width * height > limits.megapixels * 1e6:
        raise ValueError(f"the picture has {width:,} x {height:,} pixels: expected at most {limits.megapixels:g} "
                         "megapixels. Make it smaller")  # fmt: skip
    try:
        to_pixels(picture, 8)
    except Exception as error:  # every decoder raises kinds of its own for a file that ends early
        raise ValueError("the picture is damaged or ends early: expected a whole one. Save it again") from error


def own_size(pipeline: Pipeline) -> int:
    """Pixels a side of the pictures that the U-Net was trained for."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def generate_request(
    pipeline: Pipeline, request: Request, step: Callable[[int, int], None] | None = None
) -> tuple[list[Image.Image], float]:
    """Draws a checked request; may be called from several threads at once, all with the same pipeline.

    Args:
        step: called with (done, total) after each denoising step; what it raises ends the drawing.

    Returns:
        the pictures, number i from the noise of `picture_seed(seed, i)`, and the seconds that they took.
    """
    member, total = _member(pipeline, request), evaluations(pipeline, request)
    seeds = [image_seed(request.seed, i) for i in range(request.pictures)]
    side, several = request.size or own_size(pipeline), request.pictures
    named = {"height": side, "width": side}
    if request.picture is not None:
        start = (to_pixels(request.picture, side) + 1) / 2  # diffusers takes what has no negative value for 0 … 1
        named = {"image": start.expand(several, -1, -1, -1), "strength": request.strength}

    def after(_, number: int, timestep: int, kept: dict) -> dict:
        if step is not None:
            step(number + 1, total)
        return kept

    started = time.perf_counter()
    pictures = member(
        [request.prompt] * several, negative_prompt=[request.negative_prompt] * several,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], num_inference_steps=request.steps,
        guidance_scale=request.guidance, callback_on_step_end=after, **named,
    ).images  # fmt: skip
    return pictures, time.perf_counter() - started


def _member(pipeline: Pipeline, request: Request) -> DiffusionPipeline:
    """A pipeline around the same weights, for one drawing."""
    member = for_one_thread(pipeline)
    member.scheduler = _scheduler(pipeline, request)
    if request.picture is not None:
        member = AutoPipelineForImage2Image.from_pipe(member)
        member.set_progress_bar_config(disable=True)
    return member


def _scheduler(pipeline: Pipeline, request: Request):
    """A scheduler for one drawing."""
    if request.picture is not None and type(pipeline.scheduler).__name__ == "PNDMScheduler":
        # PNDM takes its first timestep twice. Begun in the middle it runs one step behind, and noise stays.
        return with_scheduler(pipeline, "dpm++").scheduler
    return copy.deepcopy(pipeline.scheduler)


def evaluations(pipeline: Pipeline, request: Request) -> int:
    """How often the U-Net is called for a request: PNDM does so once more than it has steps."""
    scheduler = _scheduler(pipeline, request)
    scheduler.set_timesteps(request.steps)
    drawn = min(int(request.steps * request.strength), request.steps)
    skipped = 0 if request.picture is None else request.steps - drawn
    return len(scheduler.timesteps) - skipped * scheduler.order


def macs(pipeline: Pipeline, request: Request) -> int:
    """Multiply-accumulates of the U-Net for a whole request, in the paper's convention; guidance doubles them."""
    side = (request.size or own_size(pipeline)) // pipeline.vae_scale_factor
    once = _macs_once(json.dumps(dict(pipeline.unet.config), default=str), side)
    return once * evaluations(pipeline, request) * request.pictures * (2 if request.guidance > 1 else 1)


@lru_cache(maxsize=64)
def _macs_once(config: str, side: int) -> int:
    return count(json.loads(config), side).macs


def cut_off(pipeline: Pipeline, text: str) -> str:
    """The end of a text that the text encoder has no room for, or nothing."""
    ids, room = pipeline.tokenizer(text).input_ids, pipeline.tokenizer.model_max_length
    return pipeline.tokenizer.decode(ids[room - 1 : -1]) if len(ids) > room else ""


class Stopped(Exception):
    """Nobody waits for the drawing any more."""
