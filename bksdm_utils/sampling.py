"""Pipelines, and prompts to pictures in memory.

Each picture has a seed of its own, and on a CPU it comes out the same bit for bit whatever the batch size, the order,
and the number of threads.
"""

from __future__ import annotations

import copy
import hashlib
import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open

from .data import in_threads
from .presets import Missing, is_hub_id, resolve

PARTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                  "scheduler"),
}  # fmt: skip
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}
SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}), "dpm++": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}), "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {}),
}  # fmt: skip
LORA_BASE = "bksdm_base"  # entry of a LoRA file's metadata: architecture_hash of the U-Net it was trained on
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
        raise (Missing if is_hub_id(place) else ValueError)(
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


def drawing_dtype(device: str) -> torch.dtype:
    """What pictures are drawn in: half precision on a GPU, full on a CPU, where half is slower."""
    return torch.float32 if device == "cpu" else torch.float16


def find_pipeline(teacher: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline | None:
    """`load_pipeline`, or None and a line that says so where the weights of a hub id are not to be had.

    Raises:
        ValueError: `teacher` is no hub id, and no whole Stable Diffusion.
    """
    try:
        return load_pipeline(teacher, device, dtype)
    except Missing as error:
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


def load_lora(pipeline: Pipeline, place: str | Path, parts: Sequence[str] = ()) -> Pipeline:
    """A pipeline with a LoRA, as diffusers' `save_lora_weights` writes it, merged into weights of its own.

    The pipeline that is given stays as it is.

    Args:
        parts: networks that it must change, of unet and text_encoder.

    Raises:
        ValueError: there is none, it lacks one of `parts`, or it was trained on another model.
    """
    before, pipeline = model_hash(pipeline), own_copy(pipeline)
    try:
        told = _lora_tensors(pipeline, place)
        pipeline.load_lora_weights(resolve(place))
    except Exception as error:  # as in load_pipeline; a LoRA of another base fails by shape or by name
        raise ValueError(f"the LoRA {str(place)!r} could not be loaded ({' '.join(str(error).split())}): expected what "
                         "save_lora_weights of diffusers writes, for this base model") from error  # fmt: skip
    adapted = pipeline.get_list_adapters()
    lacking = [part for part in parts if part not in adapted]
    if lacking:
        raise ValueError(f"the LoRA {str(place)!r} has nothing for {', '.join(lacking)}, only for "
                         f"{', '.join(adapted) or 'nothing'}: train it with train_text_encoder=True")  # fmt: skip
    taken = sum(len(get_peft_model_state_dict(getattr(pipeline, part), adapter_name=names[0]))
                for part, names in adapted.items())  # fmt: skip
    if taken < told:  # layers that the model does not have diffusers passes over in silence
        raise ValueError(f"the LoRA {str(place)!r} was trained on another model: {told - taken} of its {told} tensors "
                         "belong to layers that this one does not have")  # fmt: skip
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    if model_hash(pipeline) == before:
        raise ValueError(f"the LoRA {str(place)!r} changes no weight of this pipeline: expected diffusers' LoRA format")
    return pipeline


def _lora_tensors(pipeline: Pipeline, place: str | Path) -> int:
    """How many tensors a LoRA has; ValueError where it names another architecture as its base."""
    file = Path(resolve(place))
    file = file / "pytorch_lora_weights.safetensors" if file.is_dir() else file
    if file.is_file():
        with safe_open(file, "pt") as opened:
            base = (opened.metadata() or {}).get(LORA_BASE)
        if base not in (None, architecture_hash(pipeline.unet)):
            raise ValueError("its file says that it was trained on a U-Net of another architecture")
    return len(pipeline.lora_state_dict(resolve(place))[0])


def architecture_hash(unet: UNet2DConditionModel) -> str:
    """A hash of the names and shapes of a U-Net's parameters; the same in every precision."""
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def model_hash(pipeline: Pipeline) -> str:
    """A hash of all that draws the pictures: weights, configs, schedule, vocabularies."""
    present = {part: getattr(pipeline, part) for part in PARTS[type(pipeline).__name__]}
    tensors = {f"{part}.{name}": tensor for part, model in present.items() if isinstance(model, torch.nn.Module)
               for name, tensor in model.state_dict().items()}  # fmt: skip
    about = {part: _settings(present[part]) for part in present}
    about["empty prompt"] = pipeline.config.get("force_zeros_for_empty_prompt")
    return tensors_hash(tensors, json.dumps(about, sort_keys=True, default=str))


def _settings(part) -> object:
    """What a part of a pipeline computes with, besides its weights, but not where it came from and by which version."""
    if hasattr(part, "get_vocab"):
        return [sorted(part.get_vocab().items()), part.model_max_length]
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    passing = ("transformers_version", "dtype", "torch_dtype", "architectures")
    # Names with _ say where it came from, one of them as a list whose order each process shuffles anew.
    return [type(part).__name__, {n: value for n, value in config.items() if n[0] != "_" and n not in passing}]


def tensors_hash(tensors: Mapping[str, torch.Tensor], about: str = "") -> str:
    """Sixteen hexadecimal digits that change with any name, type, shape or bit of the tensors, and with `about`."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def with_scheduler(pipeline: Pipeline, name: str | None) -> Pipeline:
    """The same pipeline with another scheduler of the same noise schedule; None keeps its own."""
    if name is None:
        return pipeline
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}: expected one of {', '.join(SCHEDULERS)}")
    kind, changes = SCHEDULERS[name]
    changed = with_unet(pipeline, pipeline.unet)
    changed.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **changes)
    return changed


def picture_seed(seed: int, picture: int | str) -> int:
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


def draw(
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
            return _draw_pass(member, captions[start : start + size], seeds[start : start + size], sampling, size)
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
def _draw_pass(
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
    seeds = [picture_seed(settings.seed, i) for i in range(len(captions))]
    return [picture for pictures in draw(pipeline, captions, seeds, settings) for picture in pictures]
