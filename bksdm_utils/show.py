"""Everything that is drawn: sources as Markdown, picture grids, curves, feature maps, the U-Net's architecture."""

from __future__ import annotations

import inspect
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter
from PIL import Image

from .costs import count
from .pictures import Progress
from .surgery import (
    RemovalPlan,
    attention_depths,
    find_plan,
    free_plan,
    identity_plan,
    layers_per_stage,
    student_config,
)

RESNET, ATTENTION, SAMPLER = "resnet", "transformer block", "down- or upsampler"
COLOURS = {RESNET: "#4c78a8", ATTENTION: "#f2a541", SAMPLER: "#9aa5b1"}
GHOST = "#b0b7c0"
ROW_COLOURS = ("black", "#4c78a8", "#c44e52", "#f2a541", "#72a98f", "#9aa5b1")
BAR_COLOURS = ("#9aa5b1", "#c44e52")
MARKS = (
    {"marker": "*", "color": "black", "markersize": 10}, {"marker": "o", "color": "#b0b7c0", "markersize": 4},
    {"marker": ".", "color": "#4c78a8", "markersize": 7}, {"marker": "D", "color": "#c44e52", "markersize": 5},
)  # fmt: skip


def show(function) -> None:
    """Prints the real source of a function or class as Markdown, so that a notebook defines nothing twice."""
    from IPython.display import Markdown, display

    module = function.__module__.split(".")[-1]
    display(Markdown(f"`bksdm_utils/{module}.py`\n```python\n{inspect.getsource(function)}```"))


def image_grid(
    rows: Mapping[str, Sequence[Image.Image]], titles: Sequence[str] = (), scale: float = 1.25, wrap: int = 22
) -> Figure:
    """One row of pictures for each entry, its name at the left; `titles` stand above the columns."""
    columns, titles = max(len(row) for row in rows.values()), [_wrapped(title, wrap) for title in titles]
    margin = 0.1 + 0.075 * max(map(len, rows))  # inches, for the names at the left
    above = 0.1 + 0.13 * max((title.count("\n") + 1 for title in titles), default=0)
    width, height = scale * columns + margin, scale * len(rows) + above
    figure, axes = plt.subplots(len(rows), columns, figsize=(width, height), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture, interpolation="nearest")
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=6.5, pad=2)
    figure.subplots_adjust(margin / width, 0.01, 0.995, 1 - above / height, wspace=0.04, hspace=0.04)
    return figure


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


Series = Mapping[str, Sequence[tuple[float, float]]]  # name -> points


def curves(
    panels: Mapping[str, Series], xlabel: str = "optimizer step", log: Sequence[str] = (), dashed: Sequence[str] = ()
) -> Figure:
    """One panel for each entry, in it a line for each series of (x, y).

    Args:
        panels: named by what the y axis measures.
        log: panels with a logarithmic y axis.
        dashed: series that are references rather than results.
    """
    columns = len(panels) if len(panels) < 4 else 2
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        for name, points in series.items():
            style = {"linestyle": "--", "color": "grey"} if name in dashed else {"marker": "." * (len(points) < 20)}
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.4, **style)
        axis.set(ylabel=title, xlabel=xlabel)
        if title in log:
            axis.set_yscale("log")
        axis.legend(fontsize=7, framealpha=0.8, edgecolor="none", ncols=1 + (len(series) > 4))
        axis.grid(alpha=0.25)
    figure.tight_layout()
    return figure


class Live:
    """The curves of a running training: drawn again, and said in a line, every `every` seconds.

    Args:
        goal: the teacher's proxy scores, by name.
    """

    def __init__(self, max_train_steps: int, goal: Mapping[str, float], every: float = 10.0):
        self.total, self.goal, self.every = max_train_steps, goal, every
        self.drawn, self.handle, self.first = 0.0, None, None

    def update(self, rows: Sequence[Mapping], validation: Sequence[Mapping]) -> None:
        """Call it after every step, or now and then; most calls return at once.

        Args:
            rows: `engine.Step.floats` of every step so far.
            validation: rows of "step" and proxy scores.
        """
        if not rows:
            return
        now, last = time.monotonic(), rows[-1]
        if self.first is None:  # the estimate counts from the end of the first step, which is slower than the others
            self.first, self.drawn = (now, last["step"]), now
        if now - self.drawn < self.every or last["step"] == self.first[1]:
            return
        self.drawn, (started, first_step) = now, self.first
        left = (self.total - last["step"]) * (now - started) / (last["step"] - first_step)
        print(f"step {last['step']:.0f}/{self.total}  loss {last['loss']:.4f}  {left:.0f} s left", flush=True)
        self.draw(rows, validation)

    def draw(self, rows: Sequence[Mapping], validation: Sequence[Mapping]) -> Figure:
        """Draws the curves in place of those drawn before; call it once more after the last step."""
        from IPython.display import display

        figure = training_curves(rows, validation, self.goal)
        self.handle = self.handle or display(display_id=True)
        if self.handle is not None:  # None outside a notebook
            self.handle.update(figure)
        plt.close(figure)
        return figure


class Gallery:
    """The newest pictures of a folder that is being filled: drawn again, and said in a line, every `every` seconds."""

    def __init__(self, every: float = 10.0):
        self.every, self.said, self.handle, self.begun = every, time.monotonic(), None, {}

    def update(self, name: str, progress: Progress) -> None:
        """Call it after every pass; most calls return at once."""
        since, before = self.begun.setdefault(name, (time.monotonic(), progress.done))
        if time.monotonic() - self.said < self.every:
            return
        self.said = time.monotonic()
        drawn, left = progress.done - before, progress.total - progress.done
        estimate = f", {_duration(left * (self.said - since) / drawn)} left" if drawn and left else ""
        print(f"{name}: {progress.done:,} of {progress.total:,} pictures{estimate}", flush=True)
        if progress.newest:
            from IPython.display import display

            prompts, drawn = zip(*progress.newest[:8], strict=True)
            figure = image_grid({name: drawn}, [prompt.text for prompt in prompts])
            self.handle = self.handle or display(display_id=True)
            if self.handle is not None:  # None outside a notebook
                self.handle.update(figure)
            plt.close(figure)


def _duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


PROXIES = {"clip_score": "proxy CLIP score", "fid": "proxy FID"}


def training_curves(rows: Sequence[Mapping], validation: Sequence[Mapping], goal: Mapping[str, float]) -> Figure:
    """The three losses, one line for each tap, and the proxy scores (`goal` has the teacher's) over the steps."""
    steps = [row["step"] for row in rows]

    def series(names: Sequence[str]) -> dict:
        return {
            n.split("/")[-1].removeprefix("loss_"): list(zip(steps, smoothed([r[n] for r in rows]), strict=True))
            for n in names
        }

    losses = series(["loss_task", "loss_output", "loss_feature"])
    taps = series([name for name in rows[0] if name.startswith("feature/")])
    panels = {"loss": losses, "feature loss of each tap": taps}
    for name, title in PROXIES.items():
        scored = [(v["step"], v[name]) for v in validation if v[name] == v[name]]  # NaN: no judge
        if scored:
            panels[title] = {"EMA student": scored, "teacher": [(step, goal[name]) for step, _ in scored]}
    shown = {title: lines for title, lines in panels.items() if any(lines.values())}
    return curves(shown, log=("loss", "feature loss of each tap", "proxy FID"), dashed=["teacher"])


def smoothed(values: Sequence[float], width: int = 10) -> list[float]:
    """Trailing mean, of as many values as there are where fewer than `width` precede."""
    total = np.cumsum([0.0, *values])
    return [float((total[i + 1] - total[max(0, i + 1 - width)]) / min(i + 1, width)) for i in range(len(values))]


def feature_map(activation: torch.Tensor) -> np.ndarray:
    """Root mean square over channels of one activation, (C, H, W) or of self-attention (H x W, C), to (H, W)."""
    if activation.ndim == 2:
        side = math.isqrt(len(activation))
        activation = activation.T.reshape(-1, side, len(activation) // side)
    return activation.float().square().mean(0).sqrt().cpu().numpy()


def feature_maps(rows: Mapping[str, Sequence[torch.Tensor]], titles: Sequence[str]) -> Figure:
    """Activations as `feature_map` takes them, as heat maps; the maps of one column share their colour scale."""
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(1.15 * len(titles) + 1.3, 1.2 * len(rows) + 0.4))
    axes = np.atleast_2d(axes)
    maps = [[feature_map(a) for a in activations] for activations in rows.values()]
    for column, title in enumerate(titles):
        top = max(line[column].max() for line in maps)
        for row, name in enumerate(rows):
            axis = axes[row, column]
            axis.imshow(maps[row][column], cmap="magma", vmin=0, vmax=top)
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
        axes[0, column].set_title(title.replace(".", "\n", 1), fontsize=7)
    figure.tight_layout(pad=0.3)
    return figure


# --- the architecture -------------------------------------------------------------------------------------------------


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


def bars(table: Mapping[str, Mapping[str, float]], percent: Sequence[str] = (), log: Sequence[str] = ()) -> Figure:
    """A horizontal bar for each row of the table, in one panel for each column.

    Args:
        table: row name -> column name -> value; rows are drawn from the top.
        percent: columns whose values are shares.
        log: columns with a logarithmic axis.
    """
    names, columns = list(table), list(next(iter(table.values())))
    size = (2.2 * len(columns) + 1.8, 0.2 * len(names) + 0.7)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False)
    for number, (axis, column) in enumerate(zip(axes[0], columns, strict=True)):
        axis.barh(range(len(names)), [table[name][column] for name in names], height=0.7,
                  color=BAR_COLOURS[number == 0])  # fmt: skip
        axis.set_xlabel(column, fontsize=8)
        axis.tick_params(labelsize=7, left=False)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
        if column in log:
            axis.set_xscale("log")
        if column in percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    return figure


def error_bars(table: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """A dot with its error bar for each row of the table, in one panel for each column, rows from the top.

    Args:
        table: row name -> column name -> (value, error); a row may lack columns.
    """
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = -(-len(columns) // 5)
    wide = -(-len(columns) // lines)
    size = (1.9 * wide + 1.4, lines * (0.28 * len(table) + 0.7))
    figure, axes = plt.subplots(lines, wide, figsize=size, sharey=True, squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=False):
        for place, (row, colour) in enumerate(zip(table, itertools.cycle(ROW_COLOURS), strict=False)):
            if column in table[row]:
                value, error = table[row][column]
                axis.errorbar(value, place, xerr=error, fmt="o", markersize=4, capsize=3, color=colour)
        axis.set_xlabel(column, fontsize=8)
        axis.tick_params(labelsize=7, left=False)
        axis.set(yticks=range(len(table)), yticklabels=table, ylim=(len(table) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.25)
    for axis in axes.flat[len(columns) :]:
        axis.axis("off")
    figure.tight_layout()
    return figure


def tradeoff(
    groups: Mapping[str, Mapping[str, Mapping[str, float]]], ylabel: str, line: str = "", named: Sequence[str] = ()
) -> Figure:
    """What is kept (higher is better) against what it costs: a panel for each cost, a point for each network.

    The dashed Pareto front joins the networks that no cheaper or equal one beats.

    Args:
        groups: group -> network -> {ylabel: score, cost: share of the teacher's, …}.
        line: the group whose points are joined in their order.
        named: groups whose points bear their names.
    """
    first = next(iter(next(iter(groups.values())).values()))
    columns = [column for column in first if column != ylabel]
    figure, axes = plt.subplots(1, len(columns), figsize=(3.7 * len(columns), 3.3), sharey=True, squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for style, (group, points) in zip(MARKS, groups.items(), strict=False):
            x, y = ([point[key] for point in points.values()] for key in (column, ylabel))
            axis.plot(x, y, label=group, linestyle="-" if group == line else "none", linewidth=1.2, **style)
            for name, place in zip(points, zip(x, y, strict=True), strict=True) if group in named else ():
                axis.annotate(name, place, xytext=(0, 7), textcoords="offset points", fontsize=7, rotation=60)
        every = [(point[column], point[ylabel]) for points in groups.values() for point in points.values()]
        axis.plot(
            *zip(*pareto_front(every), strict=True), "--", color="#c9d1da", linewidth=1, zorder=0, label="Pareto front"
        )
        axis.set_xlabel(f"{column}, share of the teacher's", fontsize=8)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel(ylabel, fontsize=8)
    axes[0, -1].legend(fontsize=7, framealpha=0.8, edgecolor="none")
    figure.tight_layout()
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) that no other beats: each scores higher than every one that costs as much or less."""
    front = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def slider(draw: Callable[[int], Figure], name: str, values: Sequence[int]) -> None:
    """A slider over `values` that shows the figure `draw(value)`."""
    import ipywidgets as widgets

    explore(draw, widgets.SelectionSlider(options=list(values), description=name, continuous_update=False))


def explore(draw: Callable[..., Figure], *controls) -> None:
    """Controls of ipywidgets; the figure `draw(value, value, …)` of their values is drawn anew at every change."""
    _interactive(controls, lambda: [draw(*(control.value for control in controls))])


def filtered(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """A table with a menu for each of `columns`, which shows only the rows with the value chosen there."""
    import ipywidgets as widgets

    menus = [widgets.Dropdown(options=["all", *sorted(table[c].unique())], description=c) for c in columns]

    def rows() -> list[pd.DataFrame]:
        chosen = {c: menu.value for c, menu in zip(columns, menus, strict=True) if menu.value != "all"}
        return [table[(table[list(chosen)] == pd.Series(chosen, dtype=object)).all(axis=1)] if chosen else table]

    _interactive(menus, rows)


def plan_toggles(teacher_config: Mapping, draw: Callable[[RemovalPlan], Figure] | None = None) -> None:
    """Tick boxes for a free plan; every change draws `architecture` again, or says why no student fits the plan.

    Args:
        draw: gives a further figure for the plan, its pictures say.
    """
    import ipywidgets as widgets

    stages = range(len(teacher_config["block_out_channels"]))
    names = [*(f"second pair in stage {s}" for s in stages), "mid block", "innermost stage"]
    boxes = [widgets.Checkbox(True, description=name, indent=False) for name in names]

    def figures() -> list[Figure]:
        *pairs, mid, innermost = (box.value for box in boxes)
        thin = [s for s in stages if not pairs[s]]
        plan = free_plan(teacher_config, thin, mid, len(stages) - (not innermost))
        return [architecture(teacher_config, plan), *([draw(plan)] if draw else [])]

    _interactive(boxes, figures)


def _interactive(controls: Sequence, contents: Callable[[], list[Figure | pd.DataFrame]]) -> None:
    """Controls above what they change; an error of `contents` is shown in its place.

    Figures are put into image widgets. An output widget would be simpler, but headless runs now and then wait for ever
    on one (nbclient issue 312).
    """
    import ipywidgets as widgets
    from IPython.display import display

    shown = widgets.VBox()

    def widget(content: Figure | pd.DataFrame):
        if isinstance(content, pd.DataFrame):
            return widgets.HTML(content.to_html(index=False))
        return widgets.Image(value=_png(content))

    def redraw(*_) -> None:
        try:
            shown.children = [widget(content) for content in contents()]
        except ValueError as error:
            shown.children = [widgets.Label(str(error))]

    for control in controls:
        control.observe(redraw, "value")
    redraw()
    layout = widgets.Layout(flex_flow="row wrap")
    display(widgets.VBox([widgets.Box(list(controls), layout=layout), shown]))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, bbox_inches="tight")
    plt.close(figure)  # the inline backend would show it a second time
    return buffer.getvalue()
