"""Measured latency and peak memory (notebook 01)."""

from __future__ import annotations

import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.families import unet_inputs
from .counting import is_block


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass: median and the quartiles around it."""

    median: float
    low: float
    high: float


def interleaved_latency(unets: Mapping[str, nn.Module], repeats: int = 10) -> dict[str, Latency]:
    """Times several U-Nets in turn, A B A B …, so that background load affects all of them alike.

    Batch 1, latents of each U-Net's own size; a first round is not counted.
    """
    inputs = {name: _real_inputs(unet) for name, unet in unets.items()}
    seconds = defaultdict(list)
    for _ in range(1 + repeats):
        for name, unet in unets.items():
            seconds[name].append(_forward_seconds(unet, inputs[name]))
    return {name: _latency(s[1:]) for name, s in seconds.items()}


def block_latency(unet: UNet2DConditionModel, repeats: int = 10) -> dict[str, Latency]:
    """Times every top-level block of one U-Net within its forward passes; eager only, the first pass is not counted."""
    started, seconds, handles = {}, defaultdict(list), []

    def now() -> float:
        if unet.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for name, module in unet.named_modules():
        if is_block(name):
            handles.append(module.register_forward_pre_hook(lambda *_, n=name: started.update({n: now()})))
            handles.append(module.register_forward_hook(lambda *_, n=name: seconds[n].append(now() - started[n])))
    inputs = _real_inputs(unet)
    for _ in range(repeats + 1):
        _forward_seconds(unet, inputs)
    for handle in handles:
        handle.remove()
    return {name: _latency(s[1:]) for name, s in seconds.items()}


@torch.no_grad()
def peak_memory(unet: UNet2DConditionModel, batch_size: int = 1) -> int:
    """Bytes that one forward pass needs at its peak: weights, inputs and activations.

    On a GPU as its allocator counts them; on a CPU the bytes of all tensors alive at once, without the libraries' own.
    """
    inputs = _real_inputs(unet, batch_size)
    tensors = [*unet.parameters(), *unet.buffers(), *(x for x in inputs.values() if isinstance(x, torch.Tensor))]
    own = sum(t.numel() * t.element_size() for t in tensors)
    if unet.device.type == "cuda":
        unet(**inputs)
        before = torch.cuda.memory_allocated()  # of other networks too
        torch.cuda.reset_peak_memory_stats()
        unet(**inputs)
        torch.cuda.synchronize()
        return own + torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        unet(**inputs)
    return own + live.peak


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make and that are still referred to; `peak` is the most at one time."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {x.untyped_storage() for x in _tensors((args, *(kwargs or {}).values()))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage not in given and storage not in self.known:
                self.known.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return output

    def _release(self, size: int) -> None:
        self.held -= size


def _tensors(value: object) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples; faster than torch's `tree_leaves`."""
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def _real_inputs(unet: UNet2DConditionModel, batch_size: int = 1) -> dict:
    return unet_inputs(unet.config, None, batch_size, unet.device, unet.dtype)


@torch.no_grad()
def _forward_seconds(unet: nn.Module, inputs: Mapping) -> float:
    started = time.perf_counter()
    unet(**inputs)
    if unet.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _latency(seconds: Sequence[float]) -> Latency:
    if len(seconds) < 2:
        return Latency(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4)
    return Latency(median, low, high)
