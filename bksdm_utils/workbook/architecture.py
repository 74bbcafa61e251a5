"""The U-Net's architecture as a figure (notebook 01)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..core.copying import empty_unet, weight_map
from ..core.plans import RemovalPlan, identity_plan, resolve_plan, student_config
from ..costs.counting import count

KINDS = {"resnets": "resnet", "attentions": "transformer block", "samplers": "down- or upsampler"}
COLOURS = {"resnet": "#4c78a8", "transformer block": "#f2a541", "down- or upsampler": "#9aa5b1"}
REMOVED = {"facecolor": "white", "edgecolor": "#b0b7c0", "linewidth": 0.8, "linestyle": (0, (3, 2))}
MODULE = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(?:down|up)?(resnets|attentions|samplers)\.(\d+)"
                    r"(?:\.transformer_blocks\.(\d+))?")  # fmt: skip


class Box(NamedTuple):
    """A resnet, transformer block or sampler; sorts in the order of computation."""

    arm: str  # down, mid, up
    block: int
    sampler: bool
    pair: int
    kind: str  # a resnet comes before its transformer blocks
    depth: int


def architecture(teacher_config: Mapping, *plans: str | RemovalPlan) -> Figure:
    """The teacher's U-Net and, below it, one for each plan with the removed blocks dashed.

    Data flows from left to right, down the left arm, through the mid block, up the right arm. A narrow box in a row of
    orange ones is one transformer block; height falls with the stage's resolution.
    """
    shown = [identity_plan(teacher_config), *(resolve_plan(plan, teacher_config) for plan in plans)]
    height = (0.36 * len(teacher_config["block_out_channels"]) + 0.71) * len(shown) + 0.3
    figure, axes = plt.subplots(len(shown), 1, figsize=(10.5, height), squeeze=False)
    whole = count(teacher_config)
    for axis, plan in zip(axes[:, 0], shown, strict=True):
        draw_unet(axis, teacher_config, plan)
        costs = count(student_config(teacher_config, plan))
        share = "" if plan is shown[0] else f" ({costs.params / whole.params:.0%}, {costs.macs / whole.macs:.0%})"
        title = f"{plan.name}: {short(costs.params)} parameters, {short(costs.macs)} MACs{share}"
        axis.set_title(title, fontsize=9, loc="left", pad=3)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    handles.append(Patch(**REMOVED, label="removed"))
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1))
    return figure


def short(number: float) -> str:
    """A count in full, in millions or in billions: 64, 8.69 M, 860 M, 2,990 G."""
    if number < 1e5:
        return f"{number:,}"
    value, unit = (number / 1e9, "G") if number >= 1e10 else (number / 1e6, "M")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def draw_unet(axis: Axes, config: Mapping, plan: RemovalPlan) -> None:
    """Draws the teacher's U-Net, with dashed boxes where the plan removes one, and the skip connections that stay."""
    total, x, ends = len(config["block_out_channels"]), 0.0, {}
    kept = set(_boxes(weight_map(config, plan).values()))
    for _, group in groupby(_boxes(empty_unet(config).state_dict()), lambda box: box[: 1 if box.arm == "mid" else 4]):
        boxes, left = list(group), x
        narrow = any(box.depth for box in boxes)
        row = {"down": boxes[0].block, "mid": total, "up": total - 1 - boxes[0].block}[boxes[0].arm]
        for box in boxes:
            width = 0.14 if narrow and box.kind == "transformer block" else 0.5
            height = max(0.86 * 0.82**row, 0.4) * (0.7 if box.sampler else 1)
            style = {"facecolor": COLOURS[box.kind], "edgecolor": "white", "linewidth": 0.4} if box in kept else REMOVED
            axis.add_patch(Rectangle((x, -row - height / 2), width, height, **style))
            x += width + 0.04
        if not box.sampler:
            ends[box.arm, row, boxes[0].pair] = (left, x - 0.04)
        x += 0.16
    labels = {("mid", total, 0): "mid block"}
    for stage, channels in enumerate(config["block_out_channels"]):
        labels["down", stage, 0] = "{0}×{0}\n{1} channels".format(config["sample_size"] // 2**stage, channels)
    style = {"fontsize": 6.5, "color": "#555", "ha": "right", "va": "center", "linespacing": 1.0}
    for position in labels.keys() & ends.keys():
        axis.text(ends[position][0] - 0.2, -position[1], labels[position], **style)
    for stage, pairs in enumerate(plan.stages):
        for number, (down, up) in enumerate(zip(pairs.down, reversed(pairs.up[:-1]), strict=True)):
            y = -stage + 0.1 * (number - (len(pairs.down) - 1) / 2)
            between = ends["down", stage, down][1], ends["up", stage, up][0]
            axis.plot(between, (y, y), color="#c9d1da", linewidth=1, zorder=0)
    axis.set(xlim=(-1.9, x), ylim=(-total - 0.5, 0.5))
    axis.axis("off")


def _boxes(names: Iterable[str]) -> list[Box]:
    """The boxes that tensors with these names belong to, in the order of computation."""
    boxes = set()
    for arm, block, kind, pair, depth in (match.groups() for match in map(MODULE.match, names) if match):
        if kind != "attentions" or depth:
            boxes.add(Box(arm, int(block or 0), kind == "samplers", int(pair), KINDS[kind], int(depth or 0)))
    return sorted(boxes)
