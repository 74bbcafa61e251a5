"""Loading LoRAs (notebooks 05, 06)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from ..files import resolve
from .hashes import architecture_hash
from .loading import named_errors
from .pipelines import Pipeline, own_copy

LORA_BASE = "bksdm_base"  # entry of a LoRA file's metadata: architecture_hash of the U-Net it was trained on


def load_lora(pipeline: Pipeline, path: str | Path, parts: Sequence[str] = ()) -> Pipeline:
    """A copy of `pipeline` with a LoRA, as diffusers' `save_lora_weights` writes it, merged into its weights.

    Raises as `named_errors`, and ValueError where the LoRA has nothing for one of `parts` (of unet and text_encoder) or
    was trained on another model.
    """
    pipeline = own_copy(pipeline)
    with named_errors("the LoRA", path, "what save_lora_weights of diffusers writes, for this base model"):
        size = _num_tensors(pipeline, resolve(path))
        pipeline.load_lora_weights(resolve(path))
    adapters = pipeline.get_list_adapters()
    if lacking := [part for part in parts if part not in adapters]:
        raise ValueError(f"the LoRA {str(path)!r} has nothing for {', '.join(lacking)}, only for "
                         f"{', '.join(adapters) or 'nothing'}: train it with train_text_encoder=True")  # fmt: skip
    loaded = sum(len(get_peft_model_state_dict(getattr(pipeline, part), adapter_name=names[0]))
                 for part, names in adapters.items())  # fmt: skip
    if not size or loaded < size:  # diffusers skips unknown layers without an error
        raise ValueError(f"the LoRA {str(path)!r} was trained on another model: {size - loaded} of its {size} tensors "
                         "belong to layers that this one does not have")  # fmt: skip
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline


def _num_tensors(pipeline: Pipeline, path: str) -> int:
    """The number of tensors in a LoRA; ValueError where its metadata name another architecture as its base."""
    file = Path(path) / "pytorch_lora_weights.safetensors" if Path(path).is_dir() else Path(path)
    if file.is_file():
        with safe_open(file, "pt") as opened:
            base = (opened.metadata() or {}).get(LORA_BASE)
        if base not in (None, architecture_hash(pipeline.unet)):
            raise ValueError("its metadata say that it was trained on a U-Net of another architecture")
    return len(pipeline.lora_state_dict(path)[0])
