"""Configs of models without their weights."""

from __future__ import annotations

import json
from pathlib import Path

from ..config.presets import PRESETS, Preset
from ..files import resolve


def model_config(place: str | Path, part: str = "unet") -> dict:
    """The config of one part of a Stable Diffusion, without its weights.

    Args:
        place: a pipeline's folder, a preset's `configs`, or a hub id; also a folder or hub id of that part alone.
        part: unet, vae, text_encoder, text_encoder_2 or scheduler.

    Raises:
        ValueError: there is no such config, or it cannot be read or fetched.
    """
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    folder = Path(resolve(place))
    paths = [folder / part / name, folder / name] if folder.is_dir() else _from_hub(str(place), part, name)
    for path in paths:
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is no JSON ({error}): expected what diffusers writes") from error
    raise ValueError(f"{place} has no {part}/{name}: expected a diffusers folder or hub id")


def _from_hub(place: str, part: str, name: str) -> list[Path]:
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(place, f"{part}/{name}"))]
    except Exception as error:  # no such folder or repository, no network, no permission: each has its own class
        raise ValueError(
            f"the config of {place!r} cannot be had ({type(error).__name__}): expected a diffusers folder, or the id "
            "of a model on the Hugging Face hub (which needs a network)"
        ) from error


def teacher_config(preset: Preset, part: str = "unet") -> dict:
    """The config of one part of the teacher in force: of the committed ones while the preset names its own teacher."""
    own = preset.teacher == PRESETS[preset.name].teacher
    return model_config(preset.configs if own else preset.teacher, part)
