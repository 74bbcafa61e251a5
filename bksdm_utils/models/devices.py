"""What a device can do, and what helps when its memory does not suffice (all notebooks)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ..core.losses import no_autocast

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def supported_precision(precision: str, device: str) -> str:
    """The precision to compute in: as asked on a GPU, "no" elsewhere, where half is slower or untested.

    Before compute capability 8.0 (a T4 for one) bf16 is emulated, and attention falls back to full matrices: fp16.
    """
    if torch.device(device).type != "cuda":
        return "no"
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        print(f"fp16 instead of bf16, which {torch.cuda.get_device_name()} only emulates", flush=True)
        return "fp16"
    return precision


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device; from page-locked memory, so that the host need not wait for the copy to a GPU."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def memory_advice(doing: str, *settings: str) -> Iterator[None]:
    """Within the block a GPU's lack of memory says what was being done, how much is missing and what helps.

    Args:
        settings: what helps; without any, what helps a training.

    Raises:
        RuntimeError: the memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        free = re.search(r"([\d.]+ \w+) is free", str(error))
        missing = f"{wanted[1]} more were needed, {free[1]} were free" if wanted and free else str(error)
        helps = settings or ("a smaller batch_size (with more gradient_accumulation_steps)",
                             "gradient_checkpointing=True", "ema_device='cpu'")  # fmt: skip
        planned = "" if settings else ". `bksdm memory` says what fits"
        raise RuntimeError(f"out of GPU memory while {doing}: {missing}. What helps: {'; '.join(helps)}{planned}"
                           ) from error  # fmt: skip


class GroupNorm(nn.GroupNorm):
    """A group norm in its input's precision, also under autocast, which would compute it in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) -> the same shape and dtype."""
        with no_autocast(x.device):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """A layer norm in its input's precision, as `GroupNorm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> the same shape and dtype."""
        with no_autocast(x.device):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norms_in_input_precision(model: nn.Module) -> None:
    """Turns all group and layer norms into those above; their weights stay what they are."""
    for module in model.modules():
        if type(module) in (nn.GroupNorm, nn.LayerNorm):
            module.__class__ = GroupNorm if type(module) is nn.GroupNorm else LayerNorm
