"""Saving models, completely or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file


def _save_weights(model: torch.nn.Module, folder: Path) -> None:
    """Exact weights: a plain diffusers folder in one file where the model is one of diffusers'."""
    if isinstance(model, ModelMixin):
        model.save_pretrained(folder, max_shard_size="1TB")
        return
    folder.mkdir()
    save_file(_trained(model), folder / "model.safetensors")


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold: all of one of diffusers' models, of others what is trained and their buffers."""
    if isinstance(model, ModelMixin):
        return model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: t.contiguous() for name, t in model.state_dict().items() if name not in frozen}


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def save_model(model, folder: Path) -> None:
    """`model.save_pretrained(folder)`, under a temporary name until it is complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
