"""Loading pipelines and U-Nets, and swapping parts of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from ..files import NotAvailable, is_hub_id, resolve

PARTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                  "scheduler"),
}  # fmt: skip


Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


def load_pipeline(teacher: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """A Stable Diffusion or SDXL pipeline from a diffusers folder or hub id, silent and without a safety checker.

    Raises:
        Missing: a hub id that cannot be had.
        ValueError: the folder is missing, incomplete or no Stable Diffusion.
    """
    place = resolve(teacher)
    if Path(place).is_dir():
        _check_folder(Path(place))
    _quiet()
    try:
        pipeline = DiffusionPipeline.from_pretrained(place, safety_checker=None, requires_safety_checker=False)
    except Exception as error:  # a broken or foreign folder makes diffusers raise many kinds
        raise (NotAvailable if is_hub_id(place) else ValueError)(
            f"teacher {str(teacher)!r} could not be loaded: {error}\nExpected a folder as diffusers' save_pretrained "
            "writes it, or the id of a model on the Hugging Face hub (which needs a network)."
        ) from error
    if not isinstance(pipeline, Pipeline):
        raise ValueError(f"{teacher} is a {type(pipeline).__name__}: expected one of {', '.join(PARTS)}")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU
    if device != "cpu":
        pipeline.vae.enable_slicing()  # many large pictures decoded at once need more memory than drawing them
    if dtype is torch.float16 and isinstance(pipeline, StableDiffusionXLPipeline):
        dtype = torch.bfloat16  # its autoencoder overflows in fp16
    return pipeline.to(device, dtype)


def sampling_dtype(device: str) -> torch.dtype:
    """What pictures are drawn in: half precision on a GPU, full on a CPU, where half is slower."""
    return torch.float32 if device == "cpu" else torch.float16


def find_pipeline(teacher: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline | None:
    """`load_pipeline`, or None and a line that says so where the weights of a hub id are not to be had.

    Raises:
        ValueError: `teacher` is no hub id, and no whole Stable Diffusion.
    """
    try:
        return load_pipeline(teacher, device, dtype)
    except NotAvailable as error:
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


def for_one_thread(pipeline: Pipeline) -> Pipeline:
    """The same networks, with a scheduler and tokenizers of its own, for no two threads may share those.

    A scheduler remembers where it is; a tokenizer whether the last call wanted texts cut off and filled up.
    """
    member = with_unet(pipeline, pipeline.unet)
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        if hasattr(member, name):
            setattr(member, name, copy.deepcopy(getattr(member, name)))
    return member


def own_copy(pipeline: Pipeline) -> Pipeline:
    """The same pipeline with U-Net and text encoder of its own: to change them leaves the first one as it is."""
    own = with_unet(pipeline, copy.deepcopy(pipeline.unet))
    for name in ("text_encoder", "text_encoder_2"):  # SDXL has two
        if hasattr(own, name):
            setattr(own, name, copy.deepcopy(getattr(own, name)))
    return own


def load_unet(place: str | Path, pipeline: Pipeline) -> UNet2DConditionModel:
    """A U-Net of its own folder or hub id, or of a whole pipeline's, on the pipeline's device and of its type.

    Raises:
        ValueError: there is none, or it does not fit the pipeline's latents and texts.
    """
    place, within = resolve(place), {}
    if (Path(place) / "unet" / "config.json").is_file():
        within = {"subfolder": "unet"}
    try:
        unet = UNet2DConditionModel.from_pretrained(place, **within)
    except Exception as error:  # as in load_pipeline
        reason = " ".join(str(error).split())
        raise ValueError(f"no U-Net could be loaded from {place!r} ({reason}): expected a folder with config.json and "
                         "weights, such as notebook 03's unet_ema, or a hub id") from error  # fmt: skip
    for name in ("in_channels", "out_channels", "cross_attention_dim"):
        ours, theirs = unet.config[name], pipeline.unet.config[name]
        if ours != theirs:
            raise ValueError(f"the U-Net of {place!r} has {name} {ours}, the pipeline's has {theirs}: it belongs to "
                             "another teacher")  # fmt: skip
    return unet.to(pipeline.device, pipeline.unet.dtype, memory_format=torch.channels_last).eval()
