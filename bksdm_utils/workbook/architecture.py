"""The U-Net's architecture as a figure (notebook 01)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..core.plans import RemovalPlan, attention_depths, find_plan, identity_plan, layers_per_stage, student_config
from ..costs.counting import count

RESNET, ATTENTION, SAMPLER = "resnet", "transformer block", "down- or upsampler"


COLOURS = {RESNET: "#4c78a8", ATTENTION: "#f2a541", SAMPLER: "#9aa5b1"}


GHOST = "#b0b7c0"


@dataclass(frozen=True)
class Piece:
    """One box of the drawing: what it is, its row (the mid block stands below the last stage), whether it stays."""

    kind: str
    row: int
    kept: bool


def architecture(teacher_config: Mapping, *plans: str | RemovalPlan) -> Figure:
    """The teacher's U-Net and, below it, one drawing for each plan with the removed blocks ghosted.

    Data flows from left to right, down the left arm, through the mid block, up the right arm. A narrow box in a row of
    orange ones is one transformer block; height falls with the stage's resolution.
    """
    drawn = [identity_plan(teacher_config), *(find_plan(p) for p in plans)]
    rows = len(layers_per_stage(teacher_config)) + 1
    figure, axes = plt.subplots(len(drawn), 1, figsize=(10.5, (0.36 * rows + 0.35) * len(drawn) + 0.3), squeeze=False)
    whole = count(teacher_config)
    for axis, plan in zip(axes[:, 0], drawn, strict=True):
        draw_unet(axis, teacher_config, plan)
        costs = count(student_config(teacher_config, plan))
        left = "" if plan is drawn[0] else f" ({costs.params / whole.params:.0%}, {costs.macs / whole.macs:.0%})"
        size = f"{short(costs.params)} parameters, {short(costs.macs)} MACs{left}"
        axis.set_title(f"{plan.name}: {size}", fontsize=9, loc="left", pad=3)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    handles.append(Patch(facecolor="white", edgecolor=GHOST, linestyle=(0, (3, 2)), label="removed"))
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    return figure


def short(number: float) -> str:
    """A count in full, in millions or in milliards: 64, 8.69 M, 860 M, 2,990 G."""
    if number < 1e5:
        return f"{number:,}"
    value, unit = (number / 1e9, "G") if number >= 1e10 else (number / 1e6, "M")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def draw_unet(axis: Axes, config: Mapping, plan: RemovalPlan) -> None:
    """Draws one U-Net as `architecture` does, with the skip connections of the pairs that stay.

    `spans` holds, for each place of `_pieces`, the left and right end of its boxes.
    """
    x, spans, inner = 0.0, {}, len(config["block_out_channels"])
    for place, pieces in _pieces(config, plan):
        start, several = x, sum(piece.kind == ATTENTION for piece in pieces) > 1
        for piece in pieces:
            width = 0.14 if piece.kind == ATTENTION and several else 0.5
            _box(axis, x, width, piece)
            x += width + 0.04
        spans[place] = (start, x - 0.04)
        x += 0.16
    for stage, channels in enumerate(config["block_out_channels"]):
        side = config["sample_size"] // 2**stage
        _label(axis, spans["down", stage, 0][0], stage, f"{side}×{side}\n{channels} channels")
        _skips(axis, plan, stage, spans)
    if ("mid",) in spans:
        _label(axis, spans["mid",][0], inner, "mid block")
    axis.set(xlim=(-1.9, x), ylim=(-inner - 0.5, 0.5))
    axis.axis("off")


def _label(axis: Axes, x: float, row: int, text: str) -> None:
    axis.text(x - 0.2, -row, text, fontsize=6.5, color="#555", ha="right", va="center", linespacing=1.0)


def _pieces(config: Mapping, plan: RemovalPlan) -> Iterator[tuple[tuple, list[Piece]]]:
    """The boxes in the order of computation, pair by pair, each pair with its place (side, stage, number)."""
    layers, depths, total = layers_per_stage(config), attention_depths(config), len(config["block_out_channels"])

    def pair(side: str, stage: int, number: int) -> list[Piece]:
        kept = plan.stages[stage] if stage < len(plan.stages) else None
        stays = kept is not None and number in getattr(kept, side)
        attends = "CrossAttn" in config[f"{side}_block_types"][stage if side == "down" else total - 1 - stage]
        depth = (kept.depth if kept else None) or depths[stage]
        blocks = [Piece(ATTENTION, stage, stays and b < depth) for b in range(depths[stage])] if attends else []
        return [Piece(RESNET, stage, stays), *blocks]

    for stage in range(total):
        for number in range(layers[stage]):
            yield ("down", stage, number), pair("down", stage, number)
        if stage < total - 1:
            yield ("downsampler", stage), [Piece(SAMPLER, stage, stage < len(plan.stages) - 1)]
    if config.get("mid_block_type", "") is not None:
        depth = plan.stages[-1].depth or depths[len(plan.stages) - 1]
        blocks = [Piece(ATTENTION, total, plan.mid and b < depth) for b in range(depths[-1])]
        resnet = Piece(RESNET, total, plan.mid)
        yield ("mid",), [resnet, *blocks, resnet]
    for stage in reversed(range(total)):
        for number in range(layers[stage] + 1):
            yield ("up", stage, number), pair("up", stage, number)
        if stage:
            yield ("upsampler", stage), [Piece(SAMPLER, stage, stage < len(plan.stages))]


def _skips(axis: Axes, plan: RemovalPlan, stage: int, spans: Mapping) -> None:
    """A line for each skip connection that joins a pair on the way down with one on the way up."""
    if stage >= len(plan.stages):
        return
    ends = zip(plan.stages[stage].down, reversed(plan.stages[stage].up[:-1]), strict=True)
    for number, (down, up) in enumerate(ends):
        y = -stage + 0.1 * (number - (len(plan.stages[stage].down) - 1) / 2)
        x = spans["down", stage, down][1], spans["up", stage, up][0]
        axis.plot(x, (y, y), color="#c9d1da", linewidth=1, zorder=0)


def _box(axis: Axes, x: float, width: float, piece: Piece) -> None:
    height = max(0.86 * 0.82**piece.row, 0.4) * (0.7 if piece.kind == SAMPLER else 1)
    if piece.kept:
        style = {"facecolor": COLOURS[piece.kind], "edgecolor": "white", "linewidth": 0.4}
    else:
        style = {"facecolor": "white", "edgecolor": GHOST, "linewidth": 0.8, "linestyle": (0, (3, 2))}
    axis.add_patch(Rectangle((x, -piece.row - height / 2), width, height, **style))
