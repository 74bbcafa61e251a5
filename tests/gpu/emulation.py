"""In a process on the stub GPU: convolutions without cuDNN, values computed on the CPU, waits of the host counted."""

from __future__ import annotations

import collections
import ctypes
import importlib
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SHAPED_BY_VALUES = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
SOFTMAX = {aten._softmax.default, aten._log_softmax.default}
SOFTMAX_BACKWARD = {aten._softmax_backward_data.default, aten._log_softmax_backward_data.default}
BOOKKEEPING = {"aten::set_", "aten::resize_", "aten::record_stream"}
COPIES = {aten._to_copy.default, aten.copy_.default}
SYNCHRONIZE = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))

_kernels = None  # a torch.library.Library: the registrations last as long as it does


def install() -> None:
    """Replaces convolutions, whose cuDNN cannot be stubbed; turns off what else would need a real cuDNN."""
    global _kernels
    if _kernels is not None:
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.enabled = False
    torch.cuda.init()
    importlib.import_module("triton.runtime.driver")._create_driver = _without_triton
    _kernels = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        _kernels.impl("convolution", _convolution, "CUDA")
        _kernels.impl("convolution_backward", _convolution_backward, "CUDA")


def _without_triton():
    """torch then takes its kernels in CUDA instead of those in Triton."""
    raise RuntimeError("the stub GPU has no Triton")


def _layout(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """The memory format in which cuDNN gives its result."""
    last = torch.channels_last
    channels_last = x.is_contiguous(memory_format=last) or weight.is_contiguous(memory_format=last)
    return last if x.ndim == 4 and channels_last else torch.contiguous_format


def _convolution(x, weight, bias, *options):
    """An empty result of the right shape, dtype and memory format."""
    for other in (weight, bias):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise RuntimeError(f"convolution of {x.dtype} on {x.device} with {other.dtype} on {other.device}")
    form = _layout(x, weight)
    copies = [given.contiguous(memory_format=form) for given in (x, weight)]  # what cuDNN is given
    shape = _convolved(x.shape, weight.shape, *options)
    return torch.empty(shape, dtype=x.dtype, device=copies[0].device, memory_format=form)


def _convolved(x, weight, stride, padding, dilation, transposed, output_padding, groups) -> list[int]:
    """The shape of a convolution's result."""
    axes = range(len(x) - 2)
    options = ([*n] * (1 if len(n) > 1 else len(axes)) for n in (stride, padding, dilation, output_padding))
    stride, padding, dilation, more = options  # each was one number for all axes, or one for each
    reach = [dilation[i] * (weight[i + 2] - 1) + 1 for i in axes]
    if transposed:
        sides = [(x[i + 2] - 1) * stride[i] - 2 * padding[i] + reach[i] + more[i] for i in axes]
        return [x[0], weight[1] * groups, *sides]
    return [x[0], weight[0], *((x[i + 2] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in axes)]


def _convolution_backward(gradient, x, weight, bias_sizes, *options):
    form, (for_x, for_weight, for_bias) = _layout(x, weight), options[-1]
    _, x, weight = (given.contiguous(memory_format=form) for given in (gradient, x, weight))  # what cuDNN is given
    return (
        torch.empty_like(x) if for_x else None,
        torch.empty_like(weight) if for_weight else None,
        torch.empty(bias_sizes, dtype=x.dtype, device=x.device) if for_bias else None,
    )


# --- values


def alias(value):
    """A CPU tensor in the memory of a tensor on the stub; any other value as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    memory = _memory(storage.data_ptr(), storage.nbytes())
    return torch.empty(0, dtype=value.dtype).set_(memory, value.storage_offset(), value.size(), value.stride())


@cache
def _memory(address: int, size: int) -> torch.UntypedStorage:
    """The stub's memory as a storage of the CPU; it owns nothing."""
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8).untyped_storage()


def _on_cpu(value):
    """Arguments as the CPU's operation takes them."""
    if isinstance(value, torch.Tensor):
        return alias(value)
    if isinstance(value, (list, tuple)):
        return [_on_cpu(one) for one in value]
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, torch.Generator):
        return value if value.device.type == "cpu" else None
    return value


def _tensors(values) -> list[torch.Tensor]:
    """The tensors among arguments or results, also those in lists; faster than torch's own function."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [x for value in values for x in _tensors(value)]
    return []


def _on_gpu(values) -> list[torch.Tensor]:
    return [x for x in _tensors(values) if x.is_cuda]


def _again(function, args, kwargs):
    """The same operation on the CPU."""
    given, named = _on_cpu(args), {name: _on_cpu(value) for name, value in kwargs.items()}
    if function in SOFTMAX and given[2]:  # from half precision to single: on a GPU only
        given = [given[0].float(), given[1], False]
    elif function in SOFTMAX_BACKWARD:  # and back again
        given[3] = given[0].dtype
    try:
        return function(*given, **named)
    except RuntimeError as error:
        if function._schema.is_mutable:
            raise RuntimeError(f"the CPU's {function} cannot stand in for the GPU's: {error}") from error
    return function(*_single(given), **named)  # some half types the CPU does not take; a GPU computes in single inside


def _single(values):
    """Arguments with half-precision tensors in single precision."""
    if isinstance(values, list):
        return [_single(value) for value in values]
    half = isinstance(values, torch.Tensor) and values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values


@cache
def _computes_nothing(function) -> bool:
    """Whether it is a view, or changes what a tensor is rather than its values."""
    schema = function._schema
    aliases = all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return schema.name in BOOKKEEPING or (bool(schema.returns) and aliases and not schema.is_mutable)


def _shaped_by_values(function, args) -> bool:
    """Whether a GPU must wait for values to know the size of the result."""
    masks = (torch.bool, torch.uint8)
    by_mask = function in INDEXING and any(i is not None and i.dtype in masks for i in args[1])
    return function in SHAPED_BY_VALUES or by_mask


class _Emulation(TorchDispatchMode):
    """Each operation on the stub is done again on the CPU, over the same memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _on_gpu([*args, *kwargs.values()])
        if given and _shaped_by_values(function, args):
            return self._without_gpu(function, args, kwargs)
        out = function(*args, **kwargs)
        if _computes_nothing(function) or not (given or _on_gpu(out)):
            return out
        made = _again(function, args, kwargs)
        outs = _tensors(out)
        if not outs:  # a number, or nothing
            return made
        for theirs, ours in zip(outs, _tensors(made), strict=True):
            if theirs.numel() and not any(theirs is x for x in given):  # what was written in place is done
                alias(theirs).copy_(ours)
        return out

    @staticmethod
    def _without_gpu(function, args, kwargs):
        """On the CPU alone: the GPU's operation would make a tensor of a size that nothing computed."""
        if torch.cuda.get_sync_debug_mode():
            warnings.warn(f"called a synchronizing CUDA operation: {function}", stacklevel=3)
        made = _again(function, args, kwargs)
        device = _on_gpu([*args, *kwargs.values()])[0].device
        if function is aten.index_put_.default:
            return args[0]
        moved = [x.pin_memory().to(device, non_blocking=True) for x in _tensors(made)]  # the one wait is counted
        return moved[0] if isinstance(made, torch.Tensor) else tuple(moved)


@contextmanager
def emulating() -> Iterator[None]:
    """Within the block values are computed, also in threads that are started in it and in autograd's own.

    Attention is computed as matrices, since the CPU has none of the GPU's fused kernels.
    """
    run = threading.Thread.run

    def run_emulating(thread):
        with _Emulation():
            run(thread)

    threading.Thread.run = run_emulating
    try:
        with matrix_attention(), _Emulation():
            yield
    finally:
        threading.Thread.run = run


@contextmanager
def matrix_attention() -> Iterator[None]:
    """Within the block attention is computed as matrices, on the CPU too; so that results can be equal bit for bit."""
    names = ("flash", "mem_efficient")
    before = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]
    try:
        _fused_attention(dict.fromkeys(names, False))
        yield
    finally:
        _fused_attention(dict(zip(names, before, strict=True)))


def _fused_attention(enabled: dict[str, bool]) -> None:
    for name, value in enabled.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


# --- counting


@contextmanager
def syncs() -> Iterator[collections.Counter]:
    """Counts by source line where the host waits for the GPU within the block.

    That is what `set_sync_debug_mode` reports, `synchronize` of devices, streams and events, and copies said to be
    non-blocking of host memory that is not pinned. A line is the innermost of this package, then that of a library.
    """
    found = collections.Counter()

    def note(message, *_, **__):
        if "called a synchronizing CUDA operation" in str(message):
            found[_where()] += 1

    with warnings.catch_warnings(), _waits_counted(found), _UnpinnedCopies(found):
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _waits_counted(found: collections.Counter) -> Iterator[None]:
    """Within the block every `synchronize` counts itself."""

    def counting(original):
        def synchronize(*args, **kwargs):
            found[_where()] += 1
            return original(*args, **kwargs)

        return synchronize

    originals = [getattr(owner, name) for owner, name in SYNCHRONIZE]
    for (owner, name), original in zip(SYNCHRONIZE, originals, strict=True):
        setattr(owner, name, counting(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(SYNCHRONIZE, originals, strict=True):
            setattr(owner, name, original)


class _UnpinnedCopies(TorchDispatchMode):
    """Counts `non_blocking` copies from or to host memory that is not pinned: they block all the same."""

    def __init__(self, found: collections.Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function in COPIES:
            copying_in = function is aten.copy_.default
            asked = kwargs.get("non_blocking") or (copying_in and args[2:] == (True,))
            host = [t for t in (args[1] if copying_in else args[0], out) if not t.is_cuda]
            if asked and len(host) == 1 and not host[0].is_pinned():
                self.found[_where()] += 1
        return out


def _where() -> str:
    """The innermost line of bksdm_utils, and the innermost outside torch where that is another."""
    skipped = (__file__, warnings.__file__, "contextlib.py")
    stack = [frame for frame in traceback.extract_stack() if not frame.filename.endswith(skipped)]
    ours = next((f for f in reversed(stack) if "bksdm_utils" in f.filename), None)
    inner = next((f for f in reversed(stack) if "/torch/" not in f.filename), stack[-1])
    lines = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in (ours, inner) if f]
    return " <- ".join(dict.fromkeys(lines))
