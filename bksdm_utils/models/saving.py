"""Saving models, completely or not at all, and the weights of checkpoints (notebooks 03, 05, 06)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file


def save_model(model, folder: Path) -> None:
    """`model.save_pretrained(folder)`, under a temporary name until it is complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold: the whole state of a diffusers model, of others trained parameters and buffers."""
    if isinstance(model, ModelMixin):
        return model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in frozen}


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """Writes `trained_state` as one file, of a diffusers model in its plain folder."""
    if isinstance(model, ModelMixin):
        model.save_pretrained(folder, max_shard_size="1TB")
    else:
        folder.mkdir()
        save_file(trained_state(model), folder / "model.safetensors")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that `save_weights` wrote."""
    return load_file(next(folder.glob("*.safetensors")))
