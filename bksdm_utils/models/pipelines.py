"""Loading pipelines and U-Nets, and exchanging parts of them (every notebook)."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..core.families import vae_overflows_in_fp16
from ..files import NotAvailable, is_hub_id, link, resolve
from .loading import check_tokenizer, load, named_errors
from .saving import save_pipeline
from .single_file import is_single_file, load_single_file

SD_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SDXL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PARTS = {"StableDiffusionPipeline": SD_PARTS, "StableDiffusionXLPipeline": SDXL_PARTS}
Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                  "rescale_betas_zero_snr")  # fmt: skip
SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}), "dpm++": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}), "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {}),
}  # fmt: skip


def load_pipeline(teacher: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """A Stable Diffusion or SDXL pipeline, without safety checker; raises as `named_errors`.

    Args:
        teacher: a folder, a hub id, or a file in the original layout.
    """
    pipeline = load_single_file(path) if is_single_file(path := resolve(teacher)) else _load_parts(teacher)
    _check_fit(pipeline, teacher)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)  # faster convolutions, on CPU and GPU
    half = torch.bfloat16 if vae_overflows_in_fp16(pipeline) else torch.float16
    return pipeline.to(device, half if dtype is torch.float16 else dtype)


def _load_parts(teacher: str | Path) -> Pipeline:
    if os.path.isdir(path := Path(resolve(teacher))):
        with named_errors("the pipeline", teacher):
            _check_parts(path)
    with named_errors("the pipeline", teacher):
        index = DiffusionPipeline.load_config(resolve(teacher))
    if index.get("_class_name") not in PARTS:
        raise ValueError(f"{teacher} is a {index.get('_class_name')}: expected one of {', '.join(PARTS)}")
    if lacking := [part for part in PARTS[index["_class_name"]] if not index.get(part, [None])[0]]:
        raise ValueError(f"model_index.json of {teacher} names no {', '.join(lacking)}: expected a whole pipeline")
    networks = {part: load(getattr(import_module(index[part][0]), index[part][1]), teacher, subfolder=part,
                           torch_dtype=torch.float32)
                for part in PARTS[index["_class_name"]] if part in NETWORKS}  # fmt: skip
    return load(DiffusionPipeline, teacher, **networks, safety_checker=None, requires_safety_checker=False)


def _check_parts(path: Path) -> None:
    """Raises ValueError for missing parts and another kind of U-Net, which diffusers names badly or not at all."""
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    classes = {part: index[part][1] for part in SDXL_PARTS if index.get(part, [None])[0]}
    if missing := [part for part in classes if not (path / part).is_dir()]:
        raise ValueError(f"{', '.join(missing)} missing")
    if classes.get("unet", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ValueError(f"its U-Net is a {classes['unet']}, not a UNet2DConditionModel")


def _check_fit(pipeline: Pipeline, teacher: str | Path) -> None:
    """Raises ValueError for a U-Net with other inputs than latents, and a noise schedule that is none of ours."""
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        raise ValueError(f"the U-Net of {teacher} takes {channels} channels, its autoencoder makes {latents}: expected "
                         "as many (inpainting teachers cannot be distilled yet)")  # fmt: skip
    vae, texts = pipeline.vae.config, [name for name in NETWORKS if name.startswith("text") and hasattr(pipeline, name)]
    for name in texts:
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        check_tokenizer(tokenizer, getattr(pipeline, name).config.vocab_size, teacher)
    if not vae.scaling_factor or vae.scaling_factor < 0 or vae.get("shift_factor") or vae.get("latents_mean"):
        named = {name: vae.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean")}
        raise ValueError(f"the autoencoder of {teacher} has {named}: expected a scaling factor and no shift")
    config = pipeline.scheduler.config
    if "beta_schedule" not in config or config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler of {teacher} is a {type(pipeline.scheduler).__name__} that predicts "
                         f"{config.get('prediction_type', 'something else')}: expected a noise schedule of betas that "
                         "predicts epsilon or v_prediction (no EDM, no flow matching)")  # fmt: skip


def find_pipeline(teacher: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline | None:
    """`load_pipeline`, or None and a printed line where the weights of a hub id are not available."""
    try:
        return load_pipeline(teacher, device, dtype)
    except NotAvailable as error:
        print(f"No weights: {error}\nCells that need weights are skipped.")
        return None


def load_unet(path: str | Path, pipeline: Pipeline) -> UNet2DConditionModel:
    """A U-Net from its own folder or hub id, or from a whole pipeline's folder, on the pipeline's device, in its dtype.

    Raises as `named_errors`, and ValueError where it does not fit the pipeline's latents and text encoder.
    """
    unet = load(UNet2DConditionModel, path, **_within(path))
    for name in ("in_channels", "out_channels", "cross_attention_dim"):
        if unet.config[name] != pipeline.unet.config[name]:
            raise ValueError(f"the U-Net {str(path)!r} has {name} {unet.config[name]}, the pipeline's has "
                             f"{pipeline.unet.config[name]}: it belongs to another teacher")  # fmt: skip
    return unet.to(pipeline.device, pipeline.unet.dtype, memory_format=torch.channels_last).eval()


def _within(path: str | Path) -> dict[str, str]:
    """Where in a folder or a repository of the hub the U-Net is, as an argument of `from_pretrained`."""
    if is_hub_id(path):
        with named_errors("the U-Net", path):
            whole = bool(try_to_load_from_cache(str(path), "unet/config.json")) or not _on_hub(path, "config.json")
    else:
        whole = os.path.isfile(Path(resolve(path), "unet", "config.json"))
    return {"subfolder": "unet"} if whole else {}


def _on_hub(path: str | Path, file: str) -> bool:
    try:
        return bool(hf_hub_download(str(path), file))
    except RemoteEntryNotFoundError:  # other errors are no answer
        return False


def sampling_dtype(device: str) -> torch.dtype:
    """The precision of sampling: half on a GPU, full on a CPU, where half is slower."""
    return torch.float32 if device == "cpu" else torch.float16


def with_unet(pipeline: Pipeline, unet: UNet2DConditionModel) -> Pipeline:
    """The same pipeline with another U-Net; all other parts are shared."""
    settings = ("requires_safety_checker", "force_zeros_for_empty_prompt")  # SD's, SDXL's
    kept = {name: pipeline.config[name] for name in settings if name in pipeline.config}
    changed = type(pipeline)(**{**pipeline.components, "unet": unet}, **kept)
    changed.set_progress_bar_config(disable=True)
    return changed


def with_scheduler(pipeline: Pipeline, name: str | None) -> Pipeline:
    """The same pipeline with another scheduler of the same noise schedule; None keeps its own.

    Raises:
        ValueError: that scheduler cannot express the noise schedule.
    """
    if name is None:
        return pipeline
    kind, changes = SCHEDULERS[name]
    cls, config = getattr(diffusers, kind), dict(pipeline.scheduler.config)
    if cls is not type(pipeline.scheduler):  # names of solvers mean something else there
        config = {key: value for key, value in config.items() if key not in ("algorithm_type", "solver_type")}
    changed = with_unet(pipeline, pipeline.unet)
    changed.scheduler = cls.from_config(config, **changes)
    for key in NOISE_SCHEDULE:
        if config.get(key) and key not in signature(cls).parameters:
            raise ValueError(f"scheduler is {name}, which has no {key}: the teacher's is {config[key]}. Use another "
                             "one, or None for the teacher's own")  # fmt: skip
    return changed


def save_student_pipeline(pipeline: Pipeline, teacher: str | Path, unet: Path, folder: Path) -> None:
    """A whole pipeline around a saved U-Net, for plain diffusers: what it shares with the teacher's folder is linked.

    Where that folder does not load plainly in full precision (a variant, a single file) the parts are saved anew.
    """
    part, source = folder.with_name(folder.name + ".part"), _plain_folder(teacher)
    shutil.rmtree(part, ignore_errors=True)
    if source is None:
        loaded = load_pipeline(teacher)
        save_pipeline(with_unet(loaded, load_unet(unet, loaded)), part)
    else:
        pipeline.save_config(part)
        for name in PARTS[type(pipeline).__name__]:
            link(unet if name == "unet" else source / name, part / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def _plain_folder(teacher: str | Path) -> Path | None:
    """A teacher's folder, also in the hub's cache, if its parts load without options and in full precision."""
    cached = try_to_load_from_cache(str(teacher), "model_index.json") if is_hub_id(teacher) else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(resolve(teacher))
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if (folder / name).is_dir() or name == "vae":
            files = [folder / name / file for file in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
            if not any(file.is_file() for file in files):
                return None
    texts = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("text_encoder*/config.json")]
    dtypes = {text.get("dtype") or text.get("torch_dtype") or "float32" for text in texts}
    return folder if dtypes <= {"float32"} else None


def own_copy(pipeline: Pipeline, parts: Sequence[str] = ("unet", "text_encoder", "text_encoder_2")) -> Pipeline:
    """The same pipeline with copies of `parts`, which can be changed without changing the first; the rest is shared."""
    own = with_unet(pipeline, pipeline.unet)
    for name in parts:
        if hasattr(own, name):  # SDXL has two text encoders and tokenizers
            setattr(own, name, copy.deepcopy(getattr(own, name)))
    return own


def for_one_thread(pipeline: Pipeline) -> Pipeline:
    """The same networks with a scheduler and tokenizers that no other thread shares: both remember their last call."""
    return own_copy(pipeline, ("scheduler", "tokenizer", "tokenizer_2"))
