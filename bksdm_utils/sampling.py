"""Prompts to pictures. Each picture has a seed of its own, so batch size and order do not change it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from .presets import resolve

PARTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                  "scheduler"),
}  # fmt: skip
Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


def load_pipeline(teacher: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """A Stable Diffusion or SDXL pipeline from a diffusers folder or hub id, silent and without a safety checker.

    Raises:
        ValueError: the folder is missing, incomplete or no Stable Diffusion.
    """
    place = resolve(teacher)
    if Path(place).is_dir():
        _check_folder(Path(place))
    _quiet()
    try:
        pipeline = DiffusionPipeline.from_pretrained(place, safety_checker=None, requires_safety_checker=False)
    except Exception as error:  # a broken or foreign folder makes diffusers raise many kinds
        raise ValueError(
            f"teacher {str(teacher)!r} could not be loaded: {error}\nExpected a folder as diffusers' save_pretrained "
            "writes it, or the id of a model on the Hugging Face hub (which needs a network)."
        ) from error
    if not isinstance(pipeline, Pipeline):
        raise ValueError(f"{teacher} is a {type(pipeline).__name__}: expected one of {', '.join(PARTS)}")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU
    return pipeline.to(device, dtype)


def find_pipeline(teacher: str | Path, device: str = "cpu") -> Pipeline | None:
    """`load_pipeline`, or None and a line that says so where the weights of a hub id are not to be had.

    Raises:
        ValueError: `teacher` is a folder, and no whole Stable Diffusion.
    """
    if Path(resolve(teacher)).is_dir():
        return load_pipeline(teacher, device)
    try:
        return load_pipeline(teacher, device)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        print(f"No weights here: {reason}\nWhat needs weights is skipped. With a network: hf download {teacher}")
        return None


def _quiet() -> None:
    """No loading bars and hints: a notebook's outputs are for what it shows."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} has no model_index.json: expected a diffusers Stable Diffusion pipeline folder")
    try:
        parts = json.loads(index.read_text())
    except ValueError as error:
        raise ValueError(f"{index} is no JSON ({error}): expected what diffusers' save_pretrained writes") from error
    kind = parts.get("_class_name")
    if kind not in PARTS:
        raise ValueError(f"{folder} holds a {kind}: expected one of {', '.join(PARTS)} (text to image)")
    missing = [part for part in PARTS[kind] if part not in parts or not (folder / part).is_dir()]
    if missing:
        raise ValueError(f"{folder} is no complete {kind}: {', '.join(missing)} missing. Expected {PARTS[kind]}")
    if parts["unet"][1] != "UNet2DConditionModel":
        raise ValueError(f"{folder} holds a {parts['unet'][1]}: expected a UNet2DConditionModel")


def with_unet(pipeline: Pipeline, unet: UNet2DConditionModel) -> Pipeline:
    """The same pipeline around another U-Net; everything else is shared."""
    settings = ("requires_safety_checker", "force_zeros_for_empty_prompt")  # SD's, SDXL's
    kept = {name: pipeline.config[name] for name in settings if name in pipeline.config}
    swapped = type(pipeline)(**{**pipeline.components, "unet": unet}, **kept)
    swapped.set_progress_bar_config(disable=True)
    return swapped


def picture_seed(seed: int, picture: int) -> int:
    """The seed of one picture, a function of the run's seed and the picture's number."""
    high, low = np.random.SeedSequence((seed, picture)).generate_state(2)
    return int(high) << 32 | int(low)


@torch.no_grad()
def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int = 32,
) -> list[Image.Image]:
    """Draws one picture for each prompt; picture i starts from the noise of `picture_seed(seed, i)`."""
    was_training, told = pipeline.unet.training, pipeline.text_encoder.dtype
    pipeline.unet.eval()
    pictures = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        seeds = [picture_seed(seed, start + i) for i in range(len(batch))]
        # A student in training has full-precision weights, among a teacher's parts that may have half.
        with torch.autocast(pipeline.device.type, told, enabled=pipeline.unet.dtype != told):
            pictures += pipeline(
                batch, generator=[torch.Generator().manual_seed(s) for s in seeds],
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            ).images  # fmt: skip
    pipeline.unet.train(was_training)
    return pictures
