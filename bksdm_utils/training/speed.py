"""What makes a distillation step fast on a GPU; each lever has a parameter of notebook 03 (docs/benchmarks.md)."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from diffusers import UNet2DConditionModel

from ..config.training import KDTraining
from ..costs.planner import distillation_memory
from ..files import ROOT
from ..models.devices import norms_in_input_precision

COMPILED_FROM = 800  # micro-batches after which a compilation has paid for itself (126 s on an H200)


def speed_up(teacher: UNet2DConditionModel, student: UNet2DConditionModel, config: KDTraining) -> None:
    """Applies the levers that `config` switches on: memory layout, checkpointing, norms, compilation."""
    if checkpointing_needed(config, student.device.type):
        student.enable_gradient_checkpointing()
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    compiled = compilation_pays(config, student.device.type)
    for unet in (teacher, student):
        unet.to(memory_format=layout)
        if config.low_precision_norms and teacher.dtype is not torch.float32:
            norms_in_input_precision(unet)
        if compiled:
            unet.compile()
    if compiled:
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # taps may come after the first pass
        folder = config.cache_dir or ROOT / "outputs" / "cache"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "compiled"))  # a resumption finds it
        print("compiling teacher and student: the first step takes minutes; compiled=False leaves it out", flush=True)


def checkpointing_needed(config: KDTraining, device: str) -> bool:
    """Whether activations are computed twice: as `gradient_checkpointing` says, by default where a GPU is too small."""
    if config.gradient_checkpointing is not None or device != "cuda":
        return bool(config.gradient_checkpointing)
    plain, checkpointed = (distillation_memory(config.but(gradient_checkpointing=on)).card for on in (False, True))
    free, total = torch.cuda.mem_get_info()
    here = free + torch.cuda.memory_allocated()  # without what other processes use
    if plain > here:
        print(f"gradient checkpointing is on: {plain / 1e9:.1f} GB would be needed without, {checkpointed / 1e9:.1f} "
              f"with it; {here / 1e9:.1f} of {total / 1e9:.1f} are free", flush=True)  # fmt: skip
    if checkpointed > here:
        print("this does not fit either: `bksdm memory` says which batch_size does", flush=True)
    return plain > here


def compilation_pays(config: KDTraining, device: str) -> bool:
    """Whether the networks are compiled: as `compiled` says, by default in long runs on GPUs of capability 8.0 on.

    Raises:
        ValueError: asked for, but there is no C compiler.
    """
    wanted = config.compiled
    if wanted is None:
        micro_batches = config.max_train_steps * config.gradient_accumulation_steps
        wanted = device == "cuda" and micro_batches >= COMPILED_FROM and torch.cuda.get_device_capability() >= (8, 0)
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if wanted and not (compiler and (device != "cuda" or importlib.util.find_spec("triton"))):
        missing = "Triton" if compiler else "a C compiler (apt-get install gcc)"
        if config.compiled:
            raise ValueError(f"compiled=True needs {missing}, which is not installed here")
        print(f"not compiled, which would make steps faster: {missing} is not installed", flush=True)
        return False
    return wanted
