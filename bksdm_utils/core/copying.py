"""Where each student weight comes from: a complete map by name, and the copy (section 3.1; notebook 02)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from .plans import RemovalPlan, resolve_plan, student_config

_PAIR = re.compile(r"(down|up)_blocks\.(\d+)\.(?:(resnets|attentions)\.(\d+)\.)?(.+)")


@dataclass(frozen=True)
class CopyReport:
    """What became of every tensor: student names in `kept`, `moved` and `random`, teacher names in `removed`."""

    kept: tuple[str, ...]  # same name in both
    moved: tuple[str, ...]  # from a tensor of another name
    removed: tuple[str, ...]  # of the teacher, not copied
    random: tuple[str, ...]  # of the student, without a source

    def rows(self, names: Mapping[str, str]) -> list[tuple[str, str, str]]:
        """(student's tensor, teacher's tensor, fate) for every tensor of both; `names` is the weight map."""
        rows = [(n, names[n] if what != "random" else "", what)
                for what in ("kept", "moved", "random") for n in getattr(self, what)]  # fmt: skip
        return rows + [("", name, "removed") for name in self.removed]

    def __str__(self) -> str:
        counts = ((len(getattr(self, name)), name) for name in ("kept", "moved", "removed", "random"))
        return ", ".join(f"{count} {name}" for count, name in counts)


def source_of(name: str, plan: RemovalPlan, teacher_stages: int) -> str:
    """The teacher's name of the student parameter `name`."""
    match = _PAIR.fullmatch(name)
    if match is None:
        return name
    side, block, kind, pair, rest = match.groups()
    block, kept = int(block), len(plan.stages)
    stage = block if side == "down" else kept - 1 - block
    source_block = stage if side == "down" else teacher_stages - 1 - stage
    if kind is None:
        return f"{side}_blocks.{source_block}.{rest}"
    source_pair = getattr(plan.stages[stage], side)[int(pair)]
    return f"{side}_blocks.{source_block}.{kind}.{source_pair}.{rest}"


def weight_map(teacher_config: Mapping, plan: str | RemovalPlan) -> dict[str, str]:
    """Every student parameter name -> the teacher parameter name it is copied from."""
    plan = resolve_plan(plan, teacher_config)
    student = empty_unet(student_config(teacher_config, plan))
    stages = len(teacher_config["block_out_channels"])
    return {name: source_of(name, plan, stages) for name in student.state_dict()}


@torch.no_grad()
def copy_weights(
    teacher_unet: UNet2DConditionModel, student_unet: UNet2DConditionModel, plan: str | RemovalPlan
) -> CopyReport:
    """Fills the student with the teacher's weights, bit for bit.

    Raises:
        ValueError: a student tensor has no source of its shape in the teacher; the student is then unchanged.
    """
    names = weight_map(teacher_unet.config, plan)
    source, target = teacher_unet.state_dict(), student_unet.state_dict()
    bad = [n for n, s in names.items() if n not in target or s not in source or target[n].shape != source[s].shape]
    if bad or len(names) != len(target):
        raise ValueError(
            f"the student does not follow plan {getattr(plan, 'name', plan)!r}: {len(bad)} of its tensors have no "
            f"source of their shape in the teacher (first: {bad[:1]}). Build it with build_student(teacher, plan)."
        )
    for name, origin in names.items():
        target[name].copy_(source[origin])
    return copy_report(names, source)


def copy_report(names: Mapping[str, str], teacher_names) -> CopyReport:
    """Sorts a weight map into kept, moved, removed and random."""
    teacher_names = list(teacher_names)
    used = set(names.values())
    return CopyReport(
        kept=tuple(n for n, s in names.items() if n == s and s in teacher_names),
        moved=tuple(n for n, s in names.items() if n != s and s in teacher_names),
        removed=tuple(n for n in teacher_names if n not in used),
        random=tuple(n for n, s in names.items() if s not in teacher_names),
    )


def empty_unet(config: Mapping) -> UNet2DConditionModel:
    """A U-Net on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))
