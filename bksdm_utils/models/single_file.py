"""Loading Stable Diffusion from one file in its original layout, .safetensors or .ckpt (every notebook)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    fetch_diffusers_config,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)

from .loading import check_finite, named_errors

EXPECTED = ("a whole Stable Diffusion of the original layout; offline with its folder config beside it, as notebook 06 "
            "writes it")  # fmt: skip


def is_single_file(path: str | Path) -> bool:
    """Whether a path is a file that may hold a whole model."""
    return os.path.isfile(path) and str(path).endswith((".safetensors", ".ckpt"))


def config_source(path: str | Path) -> str:
    """Where the configs and the tokenizer of a file are: the folder config beside it, or a repository of the hub.

    Raises:
        ValueError: the file is damaged.
    """
    beside = Path(path).parent / "config"
    if beside.is_dir():
        return str(beside)
    with named_errors("the checkpoint", path, EXPECTED):
        return fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]


def load_single_file(path: str | Path) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline in a file, fp32, completely or not at all; raises as `named_errors`.

    A file that is marked as v-prediction (`v_pred`, and `ztsnr` for a schedule that ends in pure noise), which its
    layout cannot tell otherwise, gets that schedule.
    """
    with named_errors("the checkpoint", path, EXPECTED):
        checkpoint = load_single_file_checkpoint(str(path))
        is_xl = infer_diffusers_model_type(checkpoint).startswith("xl")
        cls = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
        options = {} if is_xl else {"safety_checker": None, "requires_safety_checker": False}
        try:
            pipeline = cls.from_single_file(str(path), config=config_source(path), torch_dtype=torch.float32, **options)
        except NotImplementedError:  # what diffusers raises for tensors that it did not find
            raise ValueError("it lacks tensors of the U-Net or the autoencoder, or names them otherwise") from None
        _check_complete(pipeline)
        _follow_marks(pipeline, checkpoint)
    return pipeline


def _check_complete(pipeline: StableDiffusionPipeline) -> None:
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    lacking = [f"{part}.{name}" for part, network in networks.items()
               for name, tensor in network.state_dict().items() if tensor.is_meta]  # fmt: skip
    for network in networks.values() if not lacking else ():
        check_finite(network)
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking[:3])}" + f" and {len(lacking) - 3} more" * (len(lacking) > 3))


def _follow_marks(pipeline: StableDiffusionPipeline, checkpoint: Mapping) -> None:
    schedule = pipeline.scheduler.config
    if "v_pred" in checkpoint and schedule.get("prediction_type") != "v_prediction":
        ends_in_noise = (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in checkpoint else {}
        )
        changes = {"prediction_type": "v_prediction", "clip_sample": False, **ends_in_noise}
        pipeline.scheduler = DDIMScheduler.from_config(schedule, **changes)
