"""Builds a student from a teacher, and recognises the plan of any U-Net (section 3.1; notebook 01)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from .copying import copy_weights, empty_unet
from .plans import (
    PER_STAGE,
    RemovalPlan,
    Stage,
    attention_depths,
    check_unet,
    identity_plan,
    layers_per_stage,
    named_plans,
    student_config,
)


def random_unet(config: Mapping, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A U-Net of this config with arbitrary weights, made quickly: for timing, which they do not influence."""
    unet = empty_unet(config).to_empty(device=device).to(memory_format=torch.channels_last)
    unet = unet if unet.dtype == dtype else unet.to(dtype)
    for tensor in unet.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    return unet.eval()


def build_student(
    teacher_unet: UNet2DConditionModel, plan: str | RemovalPlan, *, copy: bool = True, seed: int = 0
) -> UNet2DConditionModel:
    """The student of `teacher_unet`, on its device and in its dtype.

    Args:
        copy: copy the teacher's weights (section 3.1); otherwise they are random, from `seed`.
    """
    config = student_config(teacher_unet.config, plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = UNet2DConditionModel.from_config(config)
    student = student.to(teacher_unet.device, memory_format=torch.channels_last)
    student = student if student.dtype == teacher_unet.dtype else student.to(teacher_unet.dtype)
    if copy:
        copy_weights(teacher_unet, student, plan)
    return student


@dataclass(frozen=True)
class Recognition:
    """What a student's config says about it.

    Attributes:
        teacher: name of the nearest teacher.
        plan: the named plan it follows, or one inferred from its counts; None where no plan leads to it.
        differences: where its config differs from what this plan gives; empty for an exact match.
    """

    teacher: str
    plan: RemovalPlan | None
    differences: tuple[str, ...]

    def __str__(self) -> str:
        plan = self.plan.name if self.plan else "no plan"
        return f"{plan} of {self.teacher}" + "".join(f"\n  differs: {line}" for line in self.differences)


def recognise(config: Mapping, teachers: Mapping[str, Mapping]) -> Recognition:
    """Which plan, applied to which teacher, gives a U-Net of this config.

    A config says how many pairs stayed, not which: where no named plan matches, the first ones down and the last one
    up are assumed, as in the paper.

    Args:
        config: of any `UNet2DConditionModel`.
        teachers: U-Net configs by name.

    Raises:
        ValueError: not the config of a Stable-Diffusion-shaped U-Net.
    """
    check_unet(config)
    results = [_recognise(config, name, teacher) for name, teacher in teachers.items()]
    return min(results, key=lambda r: (len(r.differences), r.plan is None))


def _recognise(config: Mapping, name: str, teacher: Mapping) -> Recognition:
    plans, unreadable = [identity_plan(teacher), *named_plans(teacher).values()], ()
    try:
        plans.append(_plan_by_counts(config, teacher))
    except ValueError as error:
        unreadable = (str(error),)
    results = [Recognition(name, plan, _differences(config, student_config(teacher, plan))) for plan in plans]
    best = min(results, key=lambda r: len(r.differences))
    if unreadable and best.differences:
        return Recognition(name, None, unreadable + best.differences)
    return best


def _plan_by_counts(config: Mapping, teacher: Mapping) -> RemovalPlan:
    layers, depths = layers_per_stage(config), attention_depths(config)
    whole, own = layers_per_stage(teacher), attention_depths(teacher)
    stages = tuple(
        Stage(tuple(range(n)), (*range(n), total), depth if depth != before else None)
        for n, total, depth, before in zip(layers, whole, depths, own, strict=False)
    )
    plan = RemovalPlan("an unnamed plan", stages, _normal(config)["mid_block_type"] is not None)
    plan.check(teacher)
    return plan


def _differences(config: Mapping, expected: Mapping) -> tuple[str, ...]:
    ours, theirs = _normal(expected), _normal(config)
    return tuple(f"{key} is {theirs[key]!r}, the plan gives {ours[key]!r}" for key in ours if ours[key] != theirs[key])


def _normal(config: Mapping) -> dict:
    """A config with diffusers' defaults filled in and one spelling for everything that builds the same network."""
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    normal = {name: config.get(name, p.default) for name, p in signature.items() if name not in ("self", "sample_size")}
    normal = {key: False if value is None and key != "mid_block_type" else value for key, value in normal.items()}
    stages = len(config["block_out_channels"])
    for key in PER_STAGE:
        value = normal[key]
        normal[key] = list(value) if isinstance(value, (list, tuple)) else [value] * stages
    depths = [{*d} if isinstance(d, (list, tuple)) else {d} for d in normal["transformer_layers_per_block"]]
    used = ["CrossAttn" in kind for kind in config["down_block_types"]]
    used[-1] |= normal["mid_block_type"] is not None  # the mid block is as deep as the innermost stage
    normal["transformer_layers_per_block"] = [sorted(d) if u else [] for d, u in zip(depths, used, strict=True)]
    return normal
