"""GPU memory of training, from networks on the meta device: no GPU, no weights (notebook 03, `bksdm memory`).

Weights, gradients, optimizer and average follow from counts. What a step needs beside them, activations above all, is
measured by running the step on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import nn

from ..config.plan_files import find_plan
from ..config.training import KDTraining, Training
from ..core.copying import empty_unet
from ..core.families import text_encoder_names, unet_inputs
from ..core.losses import Batch, Distillation, LossWeights
from ..core.plans import student_config
from ..core.taps import tap_pairs
from ..models.configs import teacher_config
from ..models.devices import DTYPES, norms_in_input_precision
from .counting import count, empty_text_encoder, empty_vae
from .meta_step import GpuPrecision, step_bytes

CONTEXT = 1e9  # bytes that CUDA's context and cuDNN take beside torch's allocator, about
WORKSPACE = 34e6  # bytes of cuBLAS's workspace, which torch's allocator gives
ROUNDED = 1.01  # torch's allocator gives whole blocks: about 1 % more than the tensors have
CARDS = (12, 16, 24, 40, 80)  # GB
BYTES_OF_OPTIMIZER = {"adamw": 8, "adamw_8bit": 2}  # for each parameter, two moments


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
        return round(ROUNDED * sum(vars(self).values()) + WORKSPACE)

    @property
    def card(self) -> float:
        """What a card must have: with the context of CUDA and cuDNN."""
        return self.allocated + CONTEXT


def distillation_memory(config: KDTraining) -> Memory:
    """The memory of notebook 03 with these parameters on one GPU, eager; compiled networks need less."""
    return memory_by_micro_batch(config, [config.batch_size])[config.batch_size]


def memory_by_micro_batch(config: KDTraining, sizes: Sequence[int]) -> dict[int, Memory]:
    """`distillation_memory` for several micro-batches."""
    unet = teacher_config(config)
    teacher, student = empty_unet(unet), empty_unet(student_config(unet, find_plan(config.variant, unet)))
    size, names = DTYPES[config.mixed_precision].itemsize, text_encoder_names(unet)
    encoders = sum(num_parameters(empty_text_encoder(teacher_config(config, name))) for name in names)
    vae = num_parameters(empty_vae(teacher_config(config, "vae")))  # in full precision
    frozen = size * (num_parameters(teacher) + encoders) + 4 * vae
    return memory_by_size(config, num_parameters(student), frozen, sizes,
                          lambda size: _step_bytes(teacher, student, config.but(batch_size=size)))  # fmt: skip


def num_parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def memory_by_size(
    config: Training, trained: int, frozen: int, sizes: Sequence[int], measure: Callable[[int], int]
) -> dict[int, Memory]:
    """The memory of a training for several micro-batches; two are measured: each image adds the same bytes.

    Args:
        trained: number of parameters, in full precision.
        frozen: bytes of all other weights.
        measure: micro-batch -> bytes of a step's tensors, gradients included.
    """
    few, many = min(sizes), max(sizes) if len(sizes) < 3 else 8 * min(sizes)
    at_few = measure(few)
    slope = (measure(many) - at_few) / (many - few) if many > few else 0
    average = 4 * trained if config.ema_decay and not config.ema_device else 0
    optimizer = trained * BYTES_OF_OPTIMIZER[config.optimizer]
    activations = {size: round(at_few + slope * (size - few)) - 4 * trained for size in sizes}
    return {size: Memory(4 * trained, 4 * trained, optimizer, average, frozen, activations[size]) for size in sizes}


def _step_bytes(teacher, student, config: KDTraining) -> int:
    """`meta_step.step_bytes` of a distillation as `training.job` prepares it."""
    dtype, latent_side = DTYPES[config.mixed_precision], config.resolution // 8
    precision = GpuPrecision(dtype, config.low_precision_norms)
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
    tokens = teacher_config(config, "text_encoder")["max_position_embeddings"]
    condition["encoder_hidden_states"] = condition["encoder_hidden_states"][:, :tokens].contiguous()
    weights = LossWeights(config.lambda_sd, config.lambda_kd_output, config.lambda_kd_feat, config.normalise_features)
    pairs = tap_pairs(find_plan(config.variant, teacher.config), teacher.config, config.kd)
    distillation = Distillation(teacher, student, lambda _: condition, DDPMScheduler(), pairs, weights)
    batch = Batch(latents, latents.clone(), torch.zeros(config.batch_size, dtype=torch.long, device="meta"), None)
    try:
        return step_bytes(student, lambda: distillation.losses(student, batch).total, precision,
                          config.gradient_accumulation_steps > 1)  # fmt: skip
    finally:
        distillation.close()


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
    most, kinds = config.global_batch_size, {"plain": False, "checkpointing": True}
    columns = {name: memory_by_micro_batch(config.but(gradient_checkpointing=on), micro_batches(most))
               for name, on in kinds.items()}  # fmt: skip
    title = f"{config.variant} of {config.teacher}, {config.resolution} pixels, {config.mixed_precision}"
    return "\n".join([memory_table(f"{title}, {config.optimizer}", columns),
                      time_line(tera_operations(config), most, config.max_train_steps, tflops)])  # fmt: skip


def micro_batches(most: int) -> list[int]:
    """The powers of two up to 64 that a global batch of `most` images allows."""
    return [2**n for n in range(7) if 2**n <= most]


def memory_table(title: str, columns: Mapping[str, Mapping[int, Memory]]) -> str:
    """GB by micro-batch for each column, and the largest micro-batch that fits on each of `CARDS`."""
    widths = {name: max(7, len(name)) for name in columns}
    lines = [f"{title}: GB on one GPU, {CONTEXT / 1e9:.0f} of them for CUDA itself",
             "micro-batch   " + "   ".join(f"{name:>{width}}" for name, width in widths.items())]  # fmt: skip
    for size in next(iter(columns.values())):
        cells = (f"{_gb(memory[size]):>{widths[name]}}" for name, memory in columns.items())
        lines.append(f"{size:>11}   " + "   ".join(cells))
    for card in CARDS:
        fits = {name: max((size for size, m in memory.items() if m.card <= card * 1e9), default=0)
                for name, memory in columns.items()}  # fmt: skip
        found = ", ".join(f"{name} up to {size}" for name, size in fits.items() if size)
        lines.append(f"{card} GB: {found or 'too small'}")
    return "\n".join(lines)


def _gb(memory: Memory) -> str:
    gb = memory.card / 1e9
    return f"{gb:.1f}" if gb >= 10 else f"{gb:.2f}"


def time_line(tera: float, images: int, steps: int, tflops: float) -> str:
    """How long a training takes whose images need `tera` 10^12 operations each, at a stated throughput."""
    hours = tera * images * steps / tflops / 3600
    took = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.2g} minutes"
    return f"{tera:.3g} TFLOP an image: {steps:,} steps of batch {images} take {took} at {tflops:.0f} TFLOP/s"
