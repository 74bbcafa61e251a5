"""Image grids, curves, feature maps, bars."""

from __future__ import annotations

import inspect
import io
import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, bbox_inches="tight")
    plt.close(figure)  # the inline backend would show it a second time
    return buffer.getvalue()
