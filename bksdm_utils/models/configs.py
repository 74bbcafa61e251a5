"""Configs of models, without their weights (notebooks 01, 02, 07)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub

from ..config.shared import Teacher
from ..files import is_hub_id, resolve
from .loading import named_errors
from .single_file import config_source, is_single_file


def model_config(path: str | Path, part: str = "unet") -> dict:
    """The config of one part of a Stable Diffusion.

    Args:
        path: a pipeline's folder or hub id, a preset's `configs`, or the folder of that part itself.
        part: unet, vae, text_encoder, text_encoder_2 or scheduler.

    Raises as `named_errors`.
    """
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    if is_single_file(resolve(path)):
        path = config_source(resolve(path))
    folder = Path(resolve(path))
    with named_errors(f"the {part} config of", path, f"{part}/{name} as diffusers writes it"):
        if is_hub_id(path):
            file = Path(huggingface_hub.hf_hub_download(str(path), f"{part}/{name}"))
        else:
            file = folder / part / name if os.path.isdir(folder / part) else folder / name
        return json.loads(file.read_text(encoding="utf-8"))


def teacher_config(config: Teacher, part: str = "unet") -> dict:
    """The config of one part of the chosen teacher: the committed one where the teacher is its preset's."""
    return model_config(config.teacher if config.own_teacher else config.chosen_preset.configs, part)
