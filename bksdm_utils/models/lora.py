"""Loading LoRAs (notebooks 05, 06)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from ..files import resolve
from .hashes import architecture_hash
from .loading import check_finite, named_errors
from .pipelines import Pipeline, own_copy

LORA_BASE = "bksdm_base"  # entry of a LoRA file's metadata: architecture_hash of the U-Net it was trained on
PARTS = ("unet", "text_encoder", "text_encoder_2")
PREFIXES = (*(f"{part}." for part in PARTS), "lora_")  # diffusers', kohya's
FILE, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_config.json"
EXPECTED = ("a file or folder of save_lora_weights of diffusers, a file of kohya's scripts, or a folder of PEFT's "
            "save_pretrained, or lora.pt with its lora_config.json, for this base model")  # fmt: skip


def load_lora(pipeline: Pipeline, path: str | Path, parts: Sequence[str] = ()) -> Pipeline:
    """A copy of `pipeline` with a LoRA merged into its weights: a file of diffusers or kohya's, PEFT's folder, or
    lora.pt with its lora_config.json as BK-SDM's DreamBooth (PEFT 0.1's example) writes them.

    Raises as `named_errors`, and ValueError where the LoRA has nothing for one of `parts` (of unet and text_encoder),
    was trained on another model, or is of a kind that cannot be merged.
    """
    pipeline, path = own_copy(pipeline), resolve(path)
    with named_errors("the LoRA", path, EXPECTED):
        if adapters := _peft_folders(Path(path)):
            merged = _merge_peft(pipeline, adapters)
        elif published := _published_file(Path(path)):
            merged = _merge_published(pipeline, published)
        else:
            merged = _merge_file(pipeline, path)
        for part in merged:
            check_finite(getattr(pipeline, part))
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


def _published_file(path: Path) -> Path | None:
    """lora.pt, in a folder or named itself (also as <step>_lora.pt); ValueError without its configuration."""
    file = path / "lora.pt" if os.path.isdir(path) else path
    if file.suffix != ".pt" or not file.is_file():
        return None
    if not _config_of(file).is_file():
        raise ValueError(f"{_config_of(file).name} is not beside it, which says r and alpha")
    return file


def _config_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}_config.json")


def _merge_published(pipeline: Pipeline, file: Path) -> list[str]:
    tensors, configs = torch.load(file, "cpu", weights_only=True), json.loads(_config_of(file).read_text("utf-8"))
    prefixes = {"unet": ("model.", "peft_config"), "text_encoder": ("text_encoder_model.", "text_encoder_peft_config")}
    merged, left = [], set(tensors)
    for part, (prefix, key) in prefixes.items():
        if key in configs:
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            left -= {prefix + name for name in own}
            setattr(pipeline, part, _with_adapter(getattr(pipeline, part), own, configs[key]))
            merged.append(part)
    if left:
        raise ValueError(f"{len(left)} tensors such as {min(left)} belong to no network that {_config_of(file).name} "
                         "describes")  # fmt: skip
    return merged


def _with_adapter(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], config: Mapping) -> torch.nn.Module:
    """A network with A and B matrices of its layers merged into it; raises ValueError where they do not fit."""
    if others := [name for name in tensors if ".lora_" not in name]:
        raise ValueError(f"it also trained {len(others)} others than LoRA's matrices, such as {others[0]}: "
                         "only bias='none' can be merged")  # fmt: skip
    names = dict(network.named_modules())
    known = {name: name if name.rpartition(".lora_")[0] in names else name.removeprefix("text_model.")
             for name in tensors}  # fmt: skip
    layers = sorted({name.rpartition(".lora_")[0] for name in known.values()} & set(names))
    _check_number(sum(name.rpartition(".lora_")[0] in layers for name in known.values()), len(tensors))
    wrapped = get_peft_model(network, LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=layers))
    set_peft_model_state_dict(wrapped, {f"base_model.model.{known[name]}": t for name, t in tensors.items()})
    return wrapped.merge_and_unload()


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
