"""Loading LoRAs (notebooks 05, 06)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from ..files import resolve
from .hashes import architecture_hash
from .loading import named_errors
from .pipelines import Pipeline, own_copy

LORA_BASE = "bksdm_base"  # entry of a LoRA file's metadata: architecture_hash of the U-Net it was trained on
PARTS = ("unet", "text_encoder", "text_encoder_2")
PREFIXES = (*(f"{part}." for part in PARTS), "lora_")  # diffusers', kohya's
FILE, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_config.json"
EXPECTED = ("a file or folder of save_lora_weights of diffusers, a file of kohya's scripts, or a folder of PEFT's "
            "save_pretrained, for this base model")  # fmt: skip


def load_lora(pipeline: Pipeline, path: str | Path, parts: Sequence[str] = ()) -> Pipeline:
    """A copy of `pipeline` with a LoRA merged into its weights: a file of diffusers or kohya's, or PEFT's folder.

    Raises as `named_errors`, and ValueError where the LoRA has nothing for one of `parts` (of unet and text_encoder),
    was trained on another model, or is of a kind that cannot be merged.
    """
    pipeline, path = own_copy(pipeline), resolve(path)
    with named_errors("the LoRA", path, EXPECTED):
        adapters = _peft_folders(Path(path))
        merged = _merge_peft(pipeline, adapters) if adapters else _merge_file(pipeline, path)
    if lacking := [part for part in parts if part not in merged]:
        raise ValueError(f"the LoRA {path!r} has nothing for {', '.join(lacking)}, only for "
                         f"{', '.join(merged) or 'nothing'}: train it with train_text_encoder=True")  # fmt: skip
    return pipeline


def _peft_folders(path: Path) -> dict[str, Path]:
    """Part of the pipeline -> PEFT's folder for it: `path` itself is the U-Net's, or has one for each part."""
    folders = {"unet": path} if os.path.isfile(path / PEFT_CONFIG) else {part: path / part for part in PARTS}
    return {part: folder for part, folder in folders.items() if os.path.isfile(folder / PEFT_CONFIG)}


def _merge_peft(pipeline: Pipeline, adapters: Mapping[str, Path]) -> list[str]:
    for part, folder in adapters.items():
        wrapped = PeftModel.from_pretrained(getattr(pipeline, part), folder)
        file = folder / "adapter_model.safetensors"
        _check_number(len(get_peft_model_state_dict(wrapped).keys() & load_file(file)), len(load_file(file)))
        setattr(pipeline, part, wrapped.merge_and_unload())
    return list(adapters)


def _merge_file(pipeline: Pipeline, path: str) -> list[str]:
    file = _lora_file(path)
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    if dora := [name for name in tensors if name.endswith(("dora_scale", "lora_magnitude_vector.weight"))]:
        raise ValueError(f"it is a DoRA ({dora[0]}), which diffusers would merge as a plain LoRA: use its PEFT "
                         "folder, or merge it with the program that trained it")  # fmt: skip
    _check_base(pipeline, file)
    if not any(name.startswith(PREFIXES) for name in tensors):  # attention processors of early diffusers
        tensors = {f"unet.{name}": tensor for name, tensor in tensors.items()}
        pipeline.load_lora_weights(dict(tensors))
        size = len(pipeline.lora_state_dict(tensors)[0])
    else:
        pipeline.load_lora_weights(str(file))  # with its metadata, which may hold scales
        size = len(pipeline.lora_state_dict(str(file))[0])
    adapters = pipeline.get_list_adapters()
    _check_number(sum(len(get_peft_model_state_dict(getattr(pipeline, part), adapter_name=names[0]))
                      for part, names in adapters.items()), size)  # fmt: skip
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return list(adapters)


def _lora_file(path: str) -> Path:
    if not os.path.exists(path):
        return Path(hf_hub_download(path, FILE))
    if os.path.isfile(path):
        return Path(path)
    found = [Path(path, FILE)] if Path(path, FILE).exists() else sorted(Path(path).glob("*.safetensors"))
    found = found or sorted(Path(path).glob("*.bin"))
    if len(found) != 1:
        raise ValueError(f"the folder has {len(found)} weight files: name the file itself")
    return found[0]


def _check_base(pipeline: Pipeline, file: Path) -> None:
    """Raises ValueError where a file's metadata name another architecture as its base."""
    if file.suffix != ".safetensors":
        return
    with safe_open(file, "pt") as opened:
        base = (opened.metadata() or {}).get(LORA_BASE)
    if base not in (None, architecture_hash(pipeline.unet)):
        raise ValueError("it was trained on another model: its metadata name a U-Net of another architecture")


def _check_number(loaded: int, size: int) -> None:
    """Raises ValueError where layers were skipped, which diffusers and peft do without an error."""
    if not size or loaded < size:
        raise ValueError(f"it was trained on another model: {size - loaded} of its {size} tensors belong to layers "
                         "that this one does not have")  # fmt: skip
