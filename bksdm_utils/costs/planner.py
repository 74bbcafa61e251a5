"""GPU memory of distillation, from networks on the meta device: no GPU, no weights (notebook 03, `bksdm memory`).

Weights, gradients, optimizer and average follow from counts. What a step needs beside them, activations above all, is
measured by running the step on meta tensors, as it would run on a GPU under autocast with flash attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..config.plan_files import find_plan
from ..config.training import KDTraining
from ..core.copying import empty_unet
from ..core.families import text_encoder_names, unet_inputs
from ..core.losses import Batch, Distillation, LossWeights
from ..core.plans import student_config
from ..core.taps import tap_pairs
from ..models.configs import teacher_config
from ..models.devices import DTYPES, norms_in_input_precision
from .counting import count, empty_text_encoder, empty_vae
from .measuring import LiveBytes

CONTEXT = 1e9  # bytes that CUDA's context and cuDNN take beside torch's allocator, about
CARDS = (12, 16, 24, 40, 80)  # GB
BYTES_OF_OPTIMIZER = {"adamw": 8, "adamw_8bit": 2}  # for each parameter, two moments
LOW = (F.conv2d, F.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__)
FULL, NORMS = (F.mse_loss, F.softmax), (F.group_norm, F.layer_norm)


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs on a GPU at its peak, by what they are for.

    Attributes:
        frozen: the teacher, its text encoders and its autoencoder.
        activations: what the step needs beside all the others.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    activations: int

    @property
    def allocated(self) -> int:
        """What torch's allocator counts at the peak."""
        return sum(vars(self).values())

    @property
    def card(self) -> float:
        """What a card must have: with the context of CUDA and cuDNN."""
        return self.allocated + CONTEXT


def distillation_memory(config: KDTraining) -> Memory:
    """The memory of notebook 03 with these parameters on one GPU, eager; compiled networks need less."""
    return memory_by_micro_batch(config, [config.batch_size])[config.batch_size]


def memory_by_micro_batch(config: KDTraining, sizes: Sequence[int]) -> dict[int, Memory]:
    """`distillation_memory` for several micro-batches; two are measured, and the step's bytes grow by the same each."""
    unet = teacher_config(config)
    teacher = empty_unet(unet)
    student = empty_unet(student_config(unet, find_plan(config.variant, unet)))
    trained, frozen = _size(student), _size(teacher)
    few, many = min(sizes), max(sizes) if len(sizes) < 3 else 8 * min(sizes)
    other, at_few = _other_parts(config), step_bytes(teacher, student, config.but(batch_size=few))
    at_many = step_bytes(teacher, student, config.but(batch_size=many)) if many > few else at_few
    average = 4 * trained if config.ema_decay and not config.ema_device else 0
    memory = {}
    for size in sizes:
        step = at_few + (at_many - at_few) * (size - few) // max(1, many - few)
        activations = max(step - 4 * trained, average)  # diffusers' average makes a copy of the weights on its way
        memory[size] = Memory(
            4 * trained, 4 * trained, trained * BYTES_OF_OPTIMIZER[config.optimizer], average,
            frozen * DTYPES[config.mixed_precision].itemsize + other, activations,
        )  # fmt: skip
    return memory


def _other_parts(config: KDTraining) -> int:
    """Bytes of the text encoders in the run's precision and of the autoencoder in full."""
    size, names = DTYPES[config.mixed_precision].itemsize, text_encoder_names(teacher_config(config))
    encoders = [empty_text_encoder(teacher_config(config, name)) for name in names]
    vae = empty_vae(teacher_config(config, "vae"))
    return size * sum(map(_size, encoders)) + 4 * _size(vae)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tera_operations(config: KDTraining) -> float:
    """Floating-point operations of one image in a training step, in 10^12: teacher once, student three times."""
    unet, side = teacher_config(config), config.resolution // 8
    teacher, student = (count(network, side).macs_with_attention
                        for network in (unet, student_config(unet, find_plan(config.variant, unet))))  # fmt: skip
    return 2 * (teacher + (4 if config.gradient_checkpointing else 3) * student) / 1e12


def report(config: KDTraining, tflops: float = 200.0) -> str:
    """What a distillation needs on one GPU, by micro-batch, with and without checkpointing, and how long it takes.

    Args:
        tflops: 10^12 operations a second of the card; an H200 did 211, compiled 318 (docs/benchmarks.md).
    """
    most = config.batch_size * config.gradient_accumulation_steps
    sizes = [2**n for n in range(7) if 2**n <= most]
    table = {kept: memory_by_micro_batch(config.but(gradient_checkpointing=not kept), sizes) for kept in (True, False)}
    gb = {kept: {size: memory.card / 1e9 for size, memory in column.items()} for kept, column in table.items()}
    lines = [f"{config.variant} of {config.teacher}, {config.resolution} pixels, {config.mixed_precision}, "
             f"{config.optimizer}: GB on one GPU, {CONTEXT / 1e9:.0f} of them for CUDA itself",
             "micro-batch   plain   checkpointing"]  # fmt: skip
    lines += [f"{size:>11} {gb[True][size]:>7.1f} {gb[False][size]:>15.1f}" for size in sizes]
    for card in CARDS:
        fits = {kept: max((size for size in sizes if gb[kept][size] <= card), default=0) for kept in (True, False)}
        lines.append(f"{card} GB: micro-batches up to {fits[True]}, with checkpointing {fits[False]}"
                     if fits[False] else f"{card} GB: too small")  # fmt: skip
    one = tera_operations(config)
    hours = one * most * config.max_train_steps / tflops / 3600
    lines.append(f"{one:.2f} TFLOP an image: {config.max_train_steps:,} steps of {most} images take {hours:,.1f} hours "
                 f"at {tflops:.0f} TFLOP/s")  # fmt: skip
    return "\n".join(lines)


def step_bytes(teacher, student, config: KDTraining) -> int:
    """Bytes of all tensors that one micro-batch makes, gradients included, at the peak of its two passes."""
    dtype, latent_side = DTYPES[config.mixed_precision], config.resolution // 8
    precision = _Autocast(dtype, FULL if config.low_precision_norms else FULL + NORMS)
    student.zero_grad()
    nn.Module.to(teacher, dtype)  # diffusers' own logs a warning
    for unet in (teacher, student):
        unet.to(memory_format=torch.channels_last)
        if config.low_precision_norms and dtype is not torch.float32:
            norms_in_input_precision(unet)
    student.disable_gradient_checkpointing()
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing(precision.checkpointed)
    student.train()
    inputs = unet_inputs(teacher.config, latent_side, config.batch_size, dtype=dtype)
    latents, condition = inputs.pop("sample").float(), {k: v for k, v in inputs.items() if k != "timestep"}
    weights = LossWeights(config.lambda_sd, config.lambda_kd_output, config.lambda_kd_feat, config.normalise_features)
    pairs = tap_pairs(find_plan(config.variant, teacher.config), teacher.config, config.kd)
    distillation = Distillation(teacher, student, lambda _: condition, DDPMScheduler(), pairs, weights)
    batch = Batch(latents, latents.clone(), torch.zeros(config.batch_size, dtype=torch.long, device="meta"), None)
    with LiveBytes() as live:
        if config.gradient_accumulation_steps > 1:  # gradients of the micro-batch before
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter)
        with precision:
            loss = distillation.losses(student, batch).total
        precision.forget()
        loss.backward()
    return live.peak


class _Autocast(TorchFunctionMode):
    """What autocast and its attention do on a GPU, for meta tensors, which have neither."""

    def __init__(self, dtype: torch.dtype, full: Sequence):
        super().__init__()
        self.dtype, self.full, self.weights = dtype, full, {}

    def forget(self) -> None:
        """Releases the casts of weights, which autocast keeps until its block ends."""
        self.weights.clear()

    def checkpointed(self, module, *inputs):
        """A checkpoint whose second pass computes as the first one did."""

        def forward(*inputs):
            again = _Autocast(self.dtype, self.full)
            again.weights = self.weights if self.weights else {}
            with again:
                return module(*inputs)

        return checkpoint(forward, *inputs, use_reentrant=False)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype is torch.float32 and function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        dtype = self.dtype if function in LOW else torch.float32 if function in self.full else None
        if dtype is not None:
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        query, key, value = (self._cast(x, self.dtype) for x in (query, key, value))
        if attn_mask is None and query.dtype is not torch.float32:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True)[0]

    def _cast(self, value: object, dtype: torch.dtype) -> object:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        if value.is_leaf and value.requires_grad:  # a weight
            if id(value) not in self.weights:
                self.weights[id(value)] = value.to(dtype)
            return self.weights[id(value)]
        return value.to(dtype)
