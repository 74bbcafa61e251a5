"""Where features are compared, and how they are collected (section 3.2; notebook 03)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._pytree import tree_map

from .copying import source_of
from .plans import RemovalPlan, attention_depths, layers_per_stage, resolve_plan

KD_KINDS = ("block", "self_attention", "segmind")


def tap_pairs(plan: str | RemovalPlan, teacher_config: Mapping, kd: str = "block") -> list[tuple[str, str]]:
    """(teacher module, student module) whose outputs the feature loss compares, outermost encoder stage first.

    Args:
        kd: "block" taps the end of every stage, as BK-SDM does (section 3.2). "self_attention" taps, as KOALA does
            (arXiv 2312.04005), the self-attention of every transformer block that stayed, beside the same block of the
            teacher, and the end of those stages that have no attention. "segmind" is distill-sd's: as "block", with the
            mid block where it stayed; see `_segmind_taps` for removed stages.

    Where the plan removes innermost stages, the student's last down stage no longer ends in a downsampler as the
    teacher's does; there the last attention's `proj_out` of both is compared.

    Raises:
        ValueError: `kd` is none of these, or the plan is unknown.
    """
    if kd not in KD_KINDS:
        raise ValueError(f"kd is {kd!r}: expected one of {', '.join(KD_KINDS)}")
    plan = resolve_plan(plan, teacher_config)
    pairs = _block_taps(plan, teacher_config)
    others = {"self_attention": _self_attention_taps, "segmind": _segmind_taps}
    return others[kd](plan, teacher_config, pairs) if kd in others else pairs


def _segmind_taps(plan: RemovalPlan, teacher_config: Mapping, block_taps: Sequence) -> list[tuple[str, str]]:
    """As distill-sd's distill_training.py compares them. Where innermost stages are removed it pairs the student's last
    down stage with the teacher's up block that first has its resolution.
    """
    total, kept, pairs = len(teacher_config["block_out_channels"]), len(plan.stages), list(block_taps)
    if kept < total:
        pairs[kept - 1] = f"up_blocks.{total - kept - 1}", f"down_blocks.{kept - 1}"
    mid = [("mid_block", "mid_block")] if plan.mid and kept == total else []
    return [*pairs[:kept], *mid, *pairs[kept:]]


def _self_attention_taps(plan: RemovalPlan, teacher_config: Mapping, block_taps: Sequence) -> list[tuple[str, str]]:
    kept, depths, taps = len(plan.stages), attention_depths(teacher_config), []
    blocks = [("down", i, i) for i in range(kept)] + [("up", i, kept - 1 - i) for i in range(kept)]
    for (side, block, stage), block_tap in zip(blocks, block_taps, strict=True):
        if "CrossAttn" not in teacher_config[f"{side}_block_types"][stage if side == "down" else -1 - stage]:
            taps.append(block_tap)
            continue
        for attention in range(len(getattr(plan.stages[stage], side))):
            for depth in range(plan.stages[stage].depth or depths[stage]):
                name = f"{side}_blocks.{block}.attentions.{attention}.transformer_blocks.{depth}.attn1"
                taps.append((source_of(name, plan, len(depths)), name))
    return taps


def _block_taps(plan: RemovalPlan, teacher_config: Mapping) -> list[tuple[str, str]]:
    total, kept = len(teacher_config["block_out_channels"]), len(plan.stages)
    pairs = [(f"down_blocks.{s}", f"down_blocks.{s}") for s in range(kept)]
    if kept < total:
        last = kept - 1
        layers = layers_per_stage(teacher_config)[last]
        kind = "attentions.{}.proj_out" if "CrossAttn" in teacher_config["down_block_types"][last] else "resnets.{}"
        student_last = len(plan.stages[last].down) - 1
        pairs[last] = tuple(f"down_blocks.{last}." + kind.format(n) for n in (layers - 1, student_last))
    return pairs + [(f"up_blocks.{u + total - kept}", f"up_blocks.{u}") for u in range(kept)]


def published_inert(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The student modules whose taps gave no gradient in the published training of bk_tiny.

    Its third encoder tap is inside a checkpointed block. The reentrant checkpointing of those days returned such an
    activation without a gradient, so this term of the loss was added and trained nothing.
    """
    return [student for _, student in pairs if student.endswith("proj_out")]


class Taps:
    """Keeps the outputs of named modules of one model, from `listen` until `take`.

    Modules are held by reference, so wrapping the model later does not lose them. Passes outside of `listen` … `take`
    leave no trace: neither sampling for a validation nor the second pass of gradient checkpointing, whose outputs carry
    no gradient.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names, self._outputs = list(names), None
        self._handles = [model.get_submodule(n).register_forward_hook(self._keeper(n)) for n in self.names]

    def _keeper(self, name: str):
        def hook(_module, _inputs, output) -> None:
            if self._outputs is not None:
                self._outputs[name] = output[0] if isinstance(output, tuple) else output  # no skip tuple

        return hook

    def listen(self) -> None:
        """Starts to keep outputs, the latest of each module."""
        self._outputs = {}

    def take(self) -> list[torch.Tensor]:
        """The outputs in the order of `names`; they are released here, and no further ones are kept."""
        outputs, self._outputs = self._outputs, None
        return [outputs[name] for name in self.names]

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def tap_features(unet: UNet2DConditionModel, names: Sequence[str], **inputs) -> list[torch.Tensor]:
    """Activations (B, C, H, W), of self-attention (B, HW, C), of the named modules in one pass over `inputs`."""
    taps = Taps(unet, names)
    taps.listen()
    try:
        unet(**tree_map(lambda x: x.to(unet.dtype) if x.is_floating_point() else x, inputs))
        return taps.take()
    finally:
        taps.close()
