"""GPU memory and hours of DreamBooth, planned without a GPU or weights (`bksdm memory 05`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import nn

from ..config.dreambooth import DreamBoothTraining
from ..config.plan_files import find_plan
from ..core.copying import empty_unet
from ..core.families import is_sdxl
from ..core.losses import Batch
from ..core.plans import student_config
from ..costs.counting import count, empty_text_encoder, empty_vae
from ..costs.meta_step import GpuPrecision, step_bytes
from ..costs.planner import Memory, memory_by_size, memory_table, micro_batches, num_parameters, time_line
from ..models.configs import teacher_config
from ..models.devices import DTYPES
from .job import DreamBoothModel, DreamBoothRun


def dreambooth_memory(config: DreamBoothTraining, sizes: Sequence[int]) -> dict[int, Memory]:
    """The memory of notebook 05 by micro-batch, in images of the subject, while it trains the larger of its models.

    Frozen are the weights that get no gradients, in full precision, and the models that it samples with, in half.
    Metric networks come on top.

    Args:
        config: for one method, as `config.for_method` gives it.

    Raises:
        ValueError: an SDXL teacher.
    """
    unets = _unets(config)
    loaded = [*map(empty_unet, unets), _text_encoder(config), empty_vae(teacher_config(config, "vae"))]
    run = _run(config, unets[0])
    trained = run.model.num_trained
    frozen = 4 * (num_parameters(run.model) - trained) + 2 * sum(map(num_parameters, loaded))
    return memory_by_size(config, trained, frozen, sizes, lambda size: _step_bytes(config, run, size))


def _unets(config: DreamBoothTraining) -> list[Mapping]:
    """The configs of the U-Nets that the notebook loads, the teacher's first."""
    teacher = teacher_config(config)
    if is_sdxl(teacher):
        raise ValueError(f"DreamBooth is not written for SDXL ({config.teacher}): expected SD-v1 or SD-v2")
    student = student_config(teacher, find_plan(config.variant, teacher))
    return [unet for name, unet in (("teacher", teacher), ("student", student)) if name in config.models]


def _text_encoder(config: DreamBoothTraining) -> nn.Module:
    encoder = empty_text_encoder(teacher_config(config, "text_encoder"))
    encoder.config._attn_implementation = "sdpa"  # as loaded weights compute
    return encoder


def _run(config: DreamBoothTraining, unet: Mapping) -> DreamBoothRun:
    """A run of networks on the meta device: it has losses, and neither data nor a trainer."""
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae=empty_vae(teacher_config(config, "vae")), text_encoder=_text_encoder(config), tokenizer=None,
        unet=empty_unet(unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.unet.to(memory_format=torch.channels_last)
    model = DreamBoothModel(pipeline, config)
    return DreamBoothRun(pipeline, model, None, None, scheduler, config.prior_loss_weight, None, None)


def _step_bytes(config: DreamBoothTraining, run: DreamBoothRun, size: int) -> int:
    """`meta_step.step_bytes` of as many images of the subject, and of its class where prior preservation is on."""
    unet, images = run.model.unet, size * (2 if config.prior_loss_weight else 1)
    precision = GpuPrecision(DTYPES[config.mixed_precision], low_precision_norms=False)
    unet.disable_gradient_checkpointing()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing(precision.checkpointed)
    run.model.train()
    side = config.resolution // 8 if config.resolution else unet.config.sample_size
    latents = torch.zeros(images, 4, side, side, device="meta")
    tokens = run.model.text_encoder.config.max_position_embeddings
    numbers = torch.zeros(images, tokens, dtype=torch.long, device="meta")
    batch = Batch(latents, latents.clone(), numbers[:, 0], numbers)
    return step_bytes(run.model, lambda: run.losses(run.model, batch)["loss"], precision,
                      config.gradient_accumulation_steps > 1)  # fmt: skip


def tera_operations(config: DreamBoothTraining) -> float:
    """Floating-point operations of the U-Net for one image in a training step, in 10^12: LoRA needs none for its
    frozen weights' gradients.
    """
    unet = _unets(config)[0]
    passes = (2 if config.methods == ("lora",) else 3) + config.gradient_checkpointing
    side = config.resolution // 8 if config.resolution else unet["sample_size"]
    return 2 * passes * count(unet, side).macs_with_attention / 1e12


def report(config: DreamBoothTraining, tflops: float = 200.0) -> str:
    """What each method needs on one GPU, by micro-batch, with and without checkpointing, and how long it takes."""
    images = config.batch_size * config.gradient_accumulation_steps
    sizes, columns, times = micro_batches(max(8, images)), {}, []
    for method in config.methods:
        chosen = config.for_method(method)
        for name, on in ((method, False), (f"{method} with checkpointing", True)):
            columns[name] = dreambooth_memory(chosen.but(gradient_checkpointing=on), sizes)
        one = tera_operations(chosen) * (2 if config.prior_loss_weight else 1)
        times.append(f"{method}: {time_line(one, images, config.max_train_steps, tflops)}")
    title = f"DreamBooth of {config.teacher}, {config.mixed_precision}, {config.optimizer}"
    return "\n".join([memory_table(title, columns), *times])
