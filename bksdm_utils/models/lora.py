"""Loading LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from ..files import resolve
from .hashes import architecture_hash, model_hash
from .pipelines import Pipeline, own_copy

LORA_BASE = "bksdm_base"  # entry of a LoRA file's metadata: architecture_hash of the U-Net it was trained on


def load_lora(pipeline: Pipeline, place: str | Path, parts: Sequence[str] = ()) -> Pipeline:
    """A pipeline with a LoRA, as diffusers' `save_lora_weights` writes it, merged into weights of its own.

    The pipeline that is given stays as it is.

    Args:
        parts: networks that it must change, of unet and text_encoder.

    Raises:
        ValueError: there is none, it lacks one of `parts`, or it was trained on another model.
    """
    before, pipeline = model_hash(pipeline), own_copy(pipeline)
    try:
        told = _lora_tensors(pipeline, place)
        pipeline.load_lora_weights(resolve(place))
    except Exception as error:  # as in load_pipeline; a LoRA of another base fails by shape or by name
        raise ValueError(f"the LoRA {str(place)!r} could not be loaded ({' '.join(str(error).split())}): expected what "
                         "save_lora_weights of diffusers writes, for this base model") from error  # fmt: skip
    adapted = pipeline.get_list_adapters()
    lacking = [part for part in parts if part not in adapted]
    if lacking:
        raise ValueError(f"the LoRA {str(place)!r} has nothing for {', '.join(lacking)}, only for "
                         f"{', '.join(adapted) or 'nothing'}: train it with train_text_encoder=True")  # fmt: skip
    taken = sum(len(get_peft_model_state_dict(getattr(pipeline, part), adapter_name=names[0]))
                for part, names in adapted.items())  # fmt: skip
    if taken < told:  # layers that the model does not have diffusers passes over in silence
        raise ValueError(f"the LoRA {str(place)!r} was trained on another model: {told - taken} of its {told} tensors "
                         "belong to layers that this one does not have")  # fmt: skip
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    if model_hash(pipeline) == before:
        raise ValueError(f"the LoRA {str(place)!r} changes no weight of this pipeline: expected diffusers' LoRA format")
    return pipeline


def _lora_tensors(pipeline: Pipeline, place: str | Path) -> int:
    """How many tensors a LoRA has; ValueError where it names another architecture as its base."""
    file = Path(resolve(place))
    file = file / "pytorch_lora_weights.safetensors" if file.is_dir() else file
    if file.is_file():
        with safe_open(file, "pt") as opened:
            base = (opened.metadata() or {}).get(LORA_BASE)
        if base not in (None, architecture_hash(pipeline.unet)):
            raise ValueError("its file says that it was trained on a U-Net of another architecture")
    return len(pipeline.lora_state_dict(resolve(place))[0])
