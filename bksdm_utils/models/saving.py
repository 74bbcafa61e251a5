"""Saving models, completely or not at all, and the weights of checkpoints (notebooks 03, 05, 06)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file, save_file


def save_model(model, folder: Path) -> None:
    """A model's `save_pretrained`, or `save_pipeline`, under a temporary name until it is complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    save_pipeline(model, part) if isinstance(model, DiffusionPipeline) else model.save_pretrained(part)
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


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """A plain diffusers folder in full precision, which `from_pretrained` of transformers 4 and 5 loads alike.

    Half precision would be loaded as it is by transformers and as full by diffusers, which do not work together. The
    text encoder's names get the prefix `text_model.`, without which transformers 4 keeps random weights.
    """
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        text = file.parent.name.startswith("text_encoder")
        tensors = {prefixed(name) if text else name: tensor.float() if tensor.is_floating_point() else tensor
                   for name, tensor in load_file(file).items()}  # fmt: skip
        save_file(tensors, file, metadata={"format": "pt"})
    for file in folder.glob("text_encoder*/config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer", "tokenizer_2"):  # SDXL has two
        if tokenizer := getattr(pipeline, name, None):
            save_tokenizer(tokenizer, folder / name)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Saves with vocab.json and merges.txt, which transformers 5 no longer writes and transformers 4 needs."""
    tokenizer.save_pretrained(folder)
    if not (folder / "vocab.json").is_file():
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def prefixed(name: str) -> str:
    """A text encoder's parameter name with the prefix that transformers 4 expects and transformers 5 leaves out."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
