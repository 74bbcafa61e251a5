"""Figures of all notebooks, and `show`, which prints source code; styles and pandas' display options are set here."""

from __future__ import annotations

import inspect
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

ROW_COLOURS = ("black", "#4c78a8", "#c44e52", "#f2a541", "#72a98f", "#9aa5b1")
GROUP_STYLES = (
    {"marker": "*", "color": "black", "markersize": 10}, {"marker": "o", "color": "#b0b7c0", "markersize": 4},
    {"marker": ".", "color": "#4c78a8", "markersize": 7}, {"marker": "D", "color": "#c44e52", "markersize": 5},
)  # fmt: skip

plt.rcParams.update({
    "axes.grid": True, "grid.alpha": 0.25, "axes.labelsize": 8, "axes.titlesize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7, "legend.edgecolor": "none", "lines.linewidth": 1.3,
})  # fmt: skip
pd.set_option("display.max_columns", None, "display.max_colwidth", None, "display.max_rows", 500)


def show(function) -> None:
    """Shows the source of a function or class as Markdown, so that a notebook defines nothing twice."""
    file = function.__module__.replace(".", "/")
    display(Markdown(f"`{file}.py`\n```python\n{textwrap.dedent(inspect.getsource(function))}```"))


def image_grid(
    rows: Mapping[str, Sequence[Image.Image]], titles: Sequence[str] = (), scale: float = 1.25, wrap: int = 22
) -> Figure:
    """One row of images, `scale` inches a side, for each entry; titles above the columns in lines of `wrap`."""
    columns, titles = max(map(len, rows.values())), [textwrap.fill(title, wrap) for title in titles]
    left = 0.1 + 0.075 * max(len(line) for name in rows for line in f"{name}\n".splitlines())  # inches, as `above`
    above = 0.1 + 0.13 * max((title.count("\n") + 1 for title in titles), default=0)
    width, height = scale * columns + left, scale * len(rows) + above
    figure, axes = plt.subplots(len(rows), columns, figsize=(width, height), squeeze=False)
    for (row, column), axis in np.ndenumerate(axes):
        axis.axis("off")
        for image in list(rows.values())[row][column : column + 1]:
            axis.imshow(image, interpolation="nearest")
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.text(-0.08, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=6.5, pad=2)
    figure.subplots_adjust(left / width, 0.01, 0.995, 1 - above / height, wspace=0.04, hspace=0.04)
    return figure


def curves(
    panels: Mapping[str, Mapping], xlabel: str = "optimizer step", log: Sequence[str] = (), dashed: Sequence[str] = ()
) -> Figure:
    """A panel for each entry, named by its y axis, of lines: name -> [(x, y), …]; `dashed` ones are references."""
    columns = len(panels) if len(panels) < 4 else 2
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False, layout="tight")
    for axis, (title, series) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=("", {})):
        for name, points in series.items():
            style = {"linestyle": "--", "color": "grey"} if name in dashed else {"marker": "." * (len(points) < 20)}
            axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set(ylabel=title, xlabel=xlabel, yscale="log" if title in log else "linear", visible=bool(series))
        if series:
            axis.legend(ncols=1 + (len(series) > 4))
    return figure


def smoothed(values: Sequence[float], width: int = 10) -> list[float]:
    """Trailing mean of `width` values, of fewer at the beginning."""
    return pd.Series(values, dtype=float).rolling(width, min_periods=1).mean().tolist()


def feature_map(activation: torch.Tensor) -> np.ndarray:
    """Root mean square over channels of an activation, (C, H, W) or of self-attention (H x W, C), to (H, W)."""
    if activation.ndim == 2:
        side = math.isqrt(len(activation))
        activation = activation.T.reshape(-1, side, len(activation) // side)
    return activation.float().square().mean(0).sqrt().cpu().numpy()


def feature_maps(rows: Mapping[str, Sequence[torch.Tensor]], titles: Sequence[str]) -> Figure:
    """Activations as `feature_map` takes them, as heat maps; the maps of one column share their colour scale."""
    size = (1.15 * len(titles) + 1.3, 1.2 * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False)
    maps = [[feature_map(activation) for activation in activations] for activations in rows.values()]
    for (row, column), axis in np.ndenumerate(axes):
        axis.imshow(maps[row][column], cmap="magma", vmin=0, vmax=max(line[column].max() for line in maps))
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title.replace(".", "\n", 1))
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    return figure


def bars(table: Mapping[str, Mapping[str, float]], percent: Sequence[str] = (), log: Sequence[str] = ()) -> Figure:
    """A panel for each column of the table (row -> column -> value), in it a horizontal bar for each row."""
    figure, panels = _row_panels(table, 2.2, 0.2, per_line=99)
    for number, (column, axis) in enumerate(panels.items()):
        values = [row[column] for row in table.values()]
        axis.barh(range(len(table)), values, height=0.7, color="#9aa5b1" if number else "#c44e52", log=column in log)
        if column in percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def error_bars(table: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """A panel for each column of the table (row -> column -> value and error), in it a dot for each row that has it."""
    figure, panels = _row_panels(table, 1.9, 0.28, per_line=5)
    for column, axis in panels.items():
        for y, (row, colour) in enumerate(zip(table.values(), itertools.cycle(ROW_COLOURS), strict=False)):
            if column in row:
                axis.errorbar(row[column][0], y, xerr=row[column][1], fmt="o", markersize=4, capsize=3, color=colour)
    return figure


def _row_panels(table: Mapping[str, Mapping], width: float, row: float, per_line: int) -> tuple[Figure, dict]:
    """A figure and its panel of `width` inches for each column of the table, whose rows, `row` inches high, are y."""
    columns = list(dict.fromkeys(column for entry in table.values() for column in entry))
    lines = -(-len(columns) // per_line)
    across = -(-len(columns) // lines)
    size = (width * across + 1.8, lines * (row * len(table) + 0.7))
    figure, axes = plt.subplots(lines, across, figsize=size, sharey=True, squeeze=False, layout="tight")
    for axis, column in itertools.zip_longest(axes.flat, columns):
        axis.set(yticks=range(len(table)), yticklabels=table, ylim=(len(table) - 0.5, -0.5), xlabel=column)
        axis.set_visible(column is not None)
        axis.grid(visible=False, axis="y")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    return figure, dict(zip(columns, axes.flat, strict=False))


def tradeoff(
    groups: Mapping[str, Mapping[str, Mapping[str, float]]], ylabel: str, line: str = "", named: Sequence[str] = ()
) -> Figure:
    """A score (higher is better) against costs: a panel for each cost, a point for each network, the Pareto front.

    Args:
        groups: group -> network -> {ylabel: score, cost: share of the teacher's, …}; the points of the group `line` are
            joined in their order, those of the `named` groups have their names beside them.
    """
    networks = [network for group in groups.values() for network in group.values()]
    costs = [column for column in networks[0] if column != ylabel]
    size = (3.7 * len(costs), 3.3)
    figure, axes = plt.subplots(1, len(costs), figsize=size, sharey=True, squeeze=False, layout="tight")
    for axis, cost in zip(axes[0], costs, strict=True):
        for style, (group, points) in zip(GROUP_STYLES, groups.items(), strict=False):
            x, y = ([point[key] for point in points.values()] for key in (cost, ylabel))
            axis.plot(x, y, label=group, linestyle="-" if group == line else "none", **style)
            for name, point in zip(points, zip(x, y, strict=True), strict=True) if group in named else ():
                axis.annotate(name, point, xytext=(0, 7), textcoords="offset points", fontsize=7, rotation=60)
        front = zip(*pareto_front((network[cost], network[ylabel]) for network in networks), strict=True)
        axis.plot(*front, "--", color="#c9d1da", zorder=0, label="Pareto front")
        axis.set(xlabel=f"{cost}, share of the teacher's", ylabel="" if axis is not axes[0, 0] else ylabel)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0, -1].legend()
    return figure


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) that no other beats: each scores higher than every one that costs as much or less."""
    ranked = sorted(points, key=lambda point: (point[0], -point[1]))
    return [point for i, point in enumerate(ranked) if all(point[1] > cheaper[1] for cheaper in ranked[:i])]
