"""Hashes of models: equal in every process, different for every changed weight or setting (notebooks 03 to 06)."""

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
    """A hash of all that decides the sampled images: weights, configs, noise schedule, vocabularies."""
    parts = {name: getattr(pipeline, name) for name in PARTS[type(pipeline).__name__]}
    tensors = {f"{part}.{name}": tensor for part, model in parts.items() if isinstance(model, torch.nn.Module)
               for name, tensor in model.state_dict().items()}  # fmt: skip
    settings = {name: _settings(part) for name, part in parts.items()}
    settings["empty prompt"] = pipeline.config.get("force_zeros_for_empty_prompt")
    return tensors_hash(tensors, json.dumps(settings, sort_keys=True, default=str))


def _settings(part: object) -> list:
    """What a part of a pipeline computes with besides its weights, without its origin and versions."""
    if hasattr(part, "get_vocab"):
        return [sorted(part.get_vocab().items()), part.model_max_length]
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    origin = ("transformers_version", "dtype", "torch_dtype", "architectures")
    # Names with _ are of its origin too, one of them a list whose order differs between processes.
    return [type(part).__name__, {n: value for n, value in config.items() if n[0] != "_" and n not in origin}]


def tensors_hash(tensors: Mapping[str, torch.Tensor], metadata: str = "") -> str:
    """Sixteen hexadecimal digits that change with any name, type, shape or bit of the tensors, and with `metadata`."""
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
