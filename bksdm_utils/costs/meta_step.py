"""The memory of a training step on a GPU, measured on the meta device: no GPU, no weights (the memory planner).

A step's activations follow from its operations, so these are run on tensors without values, with the dtypes, layouts
and attention kernels that a GPU would use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from .measuring import LiveBytes

aten = torch.ops.aten
LOW = (F.conv2d, F.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__)
FULL, NORMS = (F.mse_loss, F.softmax, F.interpolate), (F.group_norm, F.layer_norm)
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


def step_bytes(model: nn.Module, loss: Callable[[], torch.Tensor], precision: GpuPrecision, accumulated: bool) -> int:
    """Bytes of all tensors that one micro-batch makes, gradients included, at the peak of its two passes.

    Args:
        model: on the meta device, like all that `loss` uses; what requires gradients is trained.
        accumulated: whether there are gradients of a micro-batch before.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    with _GpuBytes() as live:
        if accumulated:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        with precision:
            value = loss()
        precision.forget()
        value.backward()
    return live.peak


class GpuPrecision(TorchFunctionMode):
    """What autocast and the attention kernels do on a GPU, for meta tensors, which have neither.

    Args:
        dtype: of the run.
        low_precision_norms: norms compute in their input's precision (`models.devices.norms_in_input_precision`).
    """

    def __init__(self, dtype: torch.dtype, low_precision_norms: bool):
        super().__init__()
        self.dtype, self.low_precision_norms, self.weights = dtype, low_precision_norms, {}
        self.full = FULL if low_precision_norms else FULL + NORMS

    def forget(self) -> None:
        """Releases the casts of weights, which autocast keeps until its block ends."""
        self.weights.clear()

    def checkpointed(self, module, *inputs):
        """A checkpoint whose second pass computes as the first one did."""

        def forward(*inputs):
            again = GpuPrecision(self.dtype, self.low_precision_norms)
            again.weights = self.weights if self.weights else {}
            with again:
                return module(*inputs)

        return checkpoint(forward, *inputs, use_reentrant=False)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        dtype = self.dtype if function in LOW else torch.float32 if function in self.full else None
        if dtype is not None and self.dtype is not torch.float32:
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        query, key, value = (self._cast(x, self.dtype) for x in (query, key, value))
        if attn_mask is None and query.dtype is not torch.float32:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
        return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True)[0]

    def _cast(self, value: object, dtype: torch.dtype) -> object:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        if value.is_leaf and value.requires_grad:  # a weight
            if id(value) not in self.weights:
                self.weights[id(value)] = value.to(dtype)
            return self.weights[id(value)]
        return value.to(dtype)


class _GpuBytes(LiveBytes):
    """Live bytes as on a GPU, where cuDNN copies what is not in a convolution's layout; equal operations run once."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(lambda *a, **k: self._result(function, a, k), types, args, kwargs)
        if function in CONVOLUTIONS and any(map(_is_channels_last, args[:3])):
            copied = [x for x in args[:3] if isinstance(x, torch.Tensor) and x.ndim == 4 and not _is_channels_last(x)]
            self.peak = max(self.peak, self.held + sum(x.numel() * x.element_size() for x in copied))
        return out

    def _result(self, function, args: tuple, kwargs: dict):
        """The operation's result; from an earlier one's sizes where it makes new tensors, which saves much time."""
        if not _makes_tensors(function):
            return function(*args, **kwargs)
        key = (function, _described(args), _described(tuple(kwargs.items())))
        if key not in self.results:
            out = function(*args, **kwargs)
            if function in CONVOLUTIONS and any(map(_is_channels_last, args[:3])):
                out = tree_map(_to_channels_last, out)
            self.results[key] = tree_map(_described, out)
        return _made(self.results[key])


@cache
def _makes_tensors(function) -> bool:
    """Whether an operation gives new tensors, neither views nor changed ones."""
    schema = function._schema
    return not schema.is_mutable and bool(schema.returns) and not any(r.alias_info for r in schema.returns)


class _Described(tuple):
    """A tensor's shape, strides and dtype."""


def _described(value: object) -> object:
    """A value as a part of a dictionary's key; 2 and 2.0 differ, as their results do."""
    if isinstance(value, torch.Tensor):
        return _Described((tuple(value.shape), value.stride(), value.dtype))
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return (type(value), value)


def _made(result: object) -> object:
    """New tensors of described ones; other results as they were."""
    if isinstance(result, _Described):
        shape, stride, dtype = result
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return result[1] if isinstance(result[0], type) else tuple(map(_made, result))


def _is_channels_last(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _to_channels_last(x: object) -> object:
    four = isinstance(x, torch.Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if four else x
