"""Which blocks go: a `RemovalPlan` turns a teacher's U-Net config into a plain diffusers student config.

Section 3.1 of the paper. A U-Net has stages, numbered from the outermost (full resolution) inwards; each holds
(resnet, attention) pairs on its way down, one pair more on its way up, and the mid block joins the two innermost ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

PER_STAGE = ("block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim", "num_attention_heads",
             "cross_attention_dim", "only_cross_attention", "transformer_layers_per_block")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The pairs that stay in one stage, by their number in the teacher: `down` on the way in, `up` on the way out."""

    down: tuple[int, ...]
    up: tuple[int, ...]


@dataclass(frozen=True)
class RemovalPlan:
    """What a student keeps of its teacher.

    Attributes:
        name: a short name for folders and tables.
        stages: outermost first; fewer than the teacher has removes the innermost ones on both sides.
        mid: whether the mid block stays.
    """

    name: str
    stages: tuple[Stage, ...]
    mid: bool = True

    def check(self, teacher_config: Mapping) -> None:
        """Raises ValueError, saying which rule is broken, if no student of this teacher can follow the plan."""
        _check_unet(teacher_config)
        channels = list(teacher_config["block_out_channels"])
        layers = layers_per_stage(teacher_config)
        kept, total = len(self.stages), len(channels)
        if not 1 <= kept <= total:
            raise ValueError(f"plan {self.name!r} has {kept} stages, the teacher {total}: keep between 1 and {total}")
        if kept < total and channels[kept - 1] != channels[kept]:
            raise ValueError(
                f"plan {self.name!r} removes the innermost {total - kept} stages, but the teacher's stage {kept - 1} "
                f"has {channels[kept - 1]} channels and stage {kept} {channels[kept]}: the decoder's weights would not "
                f"fit. Remove only stages as wide as the one that becomes innermost."
            )
        for number, stage in enumerate(self.stages):
            self._check_stage(number, stage, layers[number])

    def _check_stage(self, number: int, stage: Stage, layers: int) -> None:
        where = f"plan {self.name!r}, stage {number}"
        for side, pairs, available in (("down", stage.down, layers), ("up", stage.up, layers + 1)):
            if list(pairs) != sorted(set(pairs)) or not set(pairs) <= set(range(available)):
                raise ValueError(f"{where}: {side}={pairs} must be rising numbers among 0 … {available - 1}")
        if len(stage.up) != len(stage.down) + 1:
            raise ValueError(
                f"{where}: {len(stage.down)} pairs down need {len(stage.down) + 1} up, not {len(stage.up)}: every "
                f"skip connection needs both its ends"
            )
        if not stage.down or stage.down[0] != 0:
            raise ValueError(f"{where}: pair 0 of down must stay, it changes the number of channels")
        if stage.up[0] != 0 or stage.up[-1] != layers:
            raise ValueError(f"{where}: pairs 0 and {layers} of up must stay, their inputs have other widths")


def plan_of(name: str, down=(0,), up=(0, 2), stages: int = 4, mid: bool = True) -> RemovalPlan:
    """A plan that treats every stage alike."""
    return RemovalPlan(name, (Stage(tuple(down), tuple(up)),) * stages, mid)


VARIANTS: dict[str, RemovalPlan] = {
    "bk_base": plan_of("bk_base"),
    "bk_small": plan_of("bk_small", mid=False),
    "bk_tiny": plan_of("bk_tiny", stages=3, mid=False),
}


def find_plan(plan: str | RemovalPlan) -> RemovalPlan:
    """A plan by its name in `VARIANTS`, or the plan itself."""
    if isinstance(plan, RemovalPlan):
        return plan
    if plan not in VARIANTS:
        raise ValueError(f"unknown variant {plan!r}: expected one of {', '.join(VARIANTS)}, or a RemovalPlan")
    return VARIANTS[plan]


def identity_plan(teacher_config: Mapping) -> RemovalPlan:
    """The plan that removes nothing."""
    layers = layers_per_stage(teacher_config)
    stages = tuple(Stage(tuple(range(n)), tuple(range(n + 1))) for n in layers)
    return RemovalPlan("teacher", stages, mid=teacher_config.get("mid_block_type") is not None)


def free_plan(
    teacher_config: Mapping,
    thin: Sequence[int] = (),
    mid: bool = True,
    stages: int | None = None,
    name: str = "own plan",
) -> RemovalPlan:
    """A plan by what it removes.

    Args:
        thin: stages that keep their first pair down, and their first and last up, as the paper's students do.
        mid: whether the mid block stays.
        stages: how many stages stay, counted from the outermost; all of them by default.
    """
    whole = identity_plan(teacher_config)
    thinned = [Stage(s.down[:1], (s.up[0], s.up[-1])) if i in thin else s for i, s in enumerate(whole.stages)]
    return RemovalPlan(name, tuple(thinned[:stages]), mid and whole.mid)


def layers_per_stage(config: Mapping) -> list[int]:
    """Number of (resnet, attention) pairs in each down stage."""
    layers = config["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)


def student_config(teacher_config: Mapping, plan: str | RemovalPlan) -> dict:
    """The student's U-Net config: plain diffusers, `UNet2DConditionModel.from_config` and `from_pretrained` take it.

    Raises:
        ValueError: the plan is unknown or does not fit the teacher, or the teacher is not Stable-Diffusion-shaped.
    """
    plan = find_plan(plan)
    plan.check(teacher_config)
    kept = len(plan.stages)
    config = {k: v for k, v in teacher_config.items() if not k.startswith("_")}
    for key in PER_STAGE:
        if isinstance(config.get(key), (list, tuple)):
            config[key] = list(config[key])[:kept]
    config["up_block_types"] = list(config["up_block_types"])[-kept:]
    layers = [len(stage.down) for stage in plan.stages]
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    if not plan.mid:
        config["mid_block_type"] = None
    return config


def empty_unet(config: Mapping) -> UNet2DConditionModel:
    """A U-Net on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def build_student(
    teacher_unet: UNet2DConditionModel, plan: str | RemovalPlan, *, copy: bool = True, seed: int = 0
) -> UNet2DConditionModel:
    """The student of `teacher_unet`, on its device and in its dtype.

    Args:
        copy: carry the teacher's weights over (section 3.1); otherwise they are random, drawn with `seed`.
    """
    from .copying import copy_weights

    config = student_config(teacher_unet.config, plan)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = UNet2DConditionModel.from_config(config)
    student = student.to(teacher_unet.device, memory_format=torch.channels_last).to(dtype=teacher_unet.dtype)
    if copy:
        copy_weights(teacher_unet, student, plan)
    return student


def _check_unet(config: Mapping) -> None:
    needed = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "cross_attention_dim")
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ValueError(
            f"not a Stable-Diffusion-shaped U-Net: its config lacks {', '.join(missing)}. "
            "Expected the config of a diffusers UNet2DConditionModel."
        )
