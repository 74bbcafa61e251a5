"""Hashes of models: the same in every process, another for every changed weight or setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel

from .pipelines import PARTS, Pipeline


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
