"""Outputs that change: lines and a figure that follow long work; controls above a figure, which stays in a page."""

from __future__ import annotations

import base64
import html
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, display
from IPython.display import Image as DisplayedImage
from matplotlib.figure import Figure

from ..core.plans import RemovalPlan, free_plan, identity_plan
from ..evaluation.folders import Progress
from ..training.preview import newest_grid
from .figures import curves, image_grid
from .surgery import architecture

LINES = 12  # printed by work of any length


class ProgressLines:
    """Prints a line whenever another of `lines` equal shares is done, with an estimate of the time left."""

    def __init__(self, total: int, lines: int = LINES):
        self.total, self.lines, self.printed, self.first = total, lines, 0, None

    def update(self, done: int, text: str) -> None:
        """Call it after every step; most calls print nothing."""
        self.first = self.first or (time.monotonic(), done)  # the first step is slower than the others
        started, before = self.first
        share = self.lines * done // max(1, self.total)
        if share == self.printed or before == done < self.total:
            return
        seconds = (self.total - done) * (time.monotonic() - started) / max(1, done - before)
        left = f"{timedelta(seconds=round(seconds))} left" if done < self.total else "finished"
        print(f"{text}, {left}", flush=True)
        self.printed = share


class LiveFigure:
    """One output of a cell, whose figure is due to be replaced every `every` seconds."""

    def __init__(self):
        self.every, self.shown, self.handle = 10.0, time.monotonic(), None

    def due(self) -> bool:
        return time.monotonic() - self.shown >= self.every

    def show(self, figure: Figure) -> Figure:
        self.shown, self.handle = time.monotonic(), self.handle or display(display_id=True)
        if self.handle is not None:  # None outside a notebook
            self.handle.update(figure)
        plt.close(figure)
        return figure


class Live:
    """Lines, curves and the newest validation images of a running training.

    Args:
        goal: the teacher's validation scores by name.
        folder: of the run; None shows no images.
    """

    def __init__(self, max_train_steps: int, goal: Mapping[str, float], folder: Path | None = None):
        self.goal, self.lines, self.figure = goal, ProgressLines(max_train_steps), LiveFigure()
        self.folder, self.grid, self.grid_handle = folder, None, None

    def update(self, rows: Sequence[Mapping], validation: Sequence[Mapping]) -> None:
        """Call it after every step, or now and then, with all rows of log and validation until then."""
        if rows:
            step = int(rows[-1]["step"])
            self.lines.update(step, f"step {step:,} of {self.lines.total:,}: loss {rows[-1]['loss']:.4f}")
            if self.figure.due():
                self.draw(rows, validation)
        grid = newest_grid(self.folder) if self.folder else None
        if grid and grid != self.grid:
            self.grid, self.grid_handle = grid, self.grid_handle or display(display_id=True)
            if self.grid_handle is not None:  # None outside a notebook
                self.grid_handle.update(DisplayedImage(filename=str(grid)))

    def draw(self, rows: Sequence[Mapping], validation: Sequence[Mapping]) -> Figure:
        """Draws losses, taps and validation scores in place of the earlier ones; call it after the last step too."""
        table = pd.DataFrame(rows).set_index("step").rolling(10, min_periods=1).mean()

        def series(prefix: str, *names: str) -> dict:
            return {n.removeprefix(prefix): list(table[n].items()) for n in names or table if n.startswith(prefix)}

        panels = {"loss": series("loss_", "loss_task", "loss_output", "loss_feature"),
                  "feature loss of each tap": series("feature/")}  # fmt: skip
        for name, title in {"clip_score": "validation CLIP score", "fid": "validation FID"}.items():
            if scored := [(row["step"], row[name]) for row in validation if math.isfinite(row.get(name, math.nan))]:
                panels[title] = {"EMA student": scored, "teacher": [(step, self.goal[name]) for step, _ in scored]}
        shown = {title: lines for title, lines in panels.items() if lines}
        log = ("loss", "feature loss of each tap", "validation FID")
        return self.figure.show(curves(shown, log=log, dashed=["teacher"]))


class Gallery:
    """Lines for each folder of images that is filled, and the newest images; every cell has a Gallery of its own."""

    def __init__(self, folders: int = 1):
        self.lines_each, self.lines, self.figure = max(1, LINES // max(1, folders)), {}, LiveFigure()

    def update(self, name: str, progress: Progress) -> None:
        """Call it after every pass."""
        lines = self.lines.setdefault(name, ProgressLines(progress.total, self.lines_each))
        lines.update(progress.done, f"{name}: {progress.done:,} of {progress.total:,} images")
        if progress.newest and (self.figure.due() or progress.done == progress.total):
            prompts, images = zip(*progress.newest[:8], strict=True)
            self.figure.show(image_grid({name: images}, [prompt.text for prompt in prompts]))


def explore(draw: Callable[..., Figure], *controls) -> None:
    """Controls of ipywidgets, and below them the figure `draw(value, value, …)` of their values."""
    _interactive(controls, lambda: [draw(*(control.value for control in controls))])


def slider(draw: Callable[[int], Figure], name: str, values: Sequence[int]) -> None:
    """A slider over `values`, and below it the figure `draw(value)`."""
    explore(draw, widgets.SelectionSlider(options=list(values), description=name, continuous_update=False))


def filtered(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """A table with a menu for each of `columns`, which leaves only the rows with the value chosen there."""
    menus = [widgets.Dropdown(options=["all", *sorted(table[c].unique())], description=c) for c in columns]

    def rows() -> list[pd.DataFrame]:
        chosen = {c: menu.value for c, menu in zip(columns, menus, strict=True) if menu.value != "all"}
        return [table[(table[list(chosen)] == pd.Series(chosen, dtype=object)).all(axis=1)]]

    _interactive(menus, rows)


def plan_toggles(config: Mapping, plan: RemovalPlan, draw: Callable[[RemovalPlan], Figure] | None = None) -> None:
    """Tick boxes that begin with `plan`; its architecture and the figure `draw(plan)`, or why no student can follow."""
    whole, kept = identity_plan(config).stages, plan.stages
    thin = [s for s, stage in enumerate(kept) if len(stage.down) < len(whole[s].down)]
    ticked = {f"second pair in stage {s}": s not in thin for s in range(len(whole))}
    ticked |= {"mid block": plan.mid, "innermost stage": len(kept) == len(whole)}
    boxes = [widgets.Checkbox(value, description=name, indent=False) for name, value in ticked.items()]

    def figures() -> list[Figure]:
        *pairs, mid, innermost = (box.value for box in boxes)
        thin = [s for s, pair in enumerate(pairs) if not pair]
        own = free_plan(config, thin, mid, len(whole) - (not innermost))
        shown = plan if (own.stages, own.mid) == (plan.stages, plan.mid) else own
        return [architecture(config, shown), *([draw(shown)] if draw else [])]

    _interactive(boxes, figures)


def _interactive(controls: Sequence, contents: Callable[[], list[Figure | pd.DataFrame]]) -> None:
    """Controls above what they change; an error of `contents` is shown in its place.

    An output widget would be simpler, but headless runs sometimes never return from one (nbclient issue 312).
    """

    def page() -> HTML:
        try:
            return HTML("".join(map(_html, contents())))
        except ValueError as error:
            return HTML(f"<p>{html.escape(str(error))}</p>")

    display(widgets.Box(list(controls), layout=widgets.Layout(flex_flow="row wrap")))
    shown = display(page(), display_id=True)
    for control in controls:
        control.observe(lambda _: shown.update(page()), "value")


def _html(content: Figure | pd.DataFrame) -> str:
    if isinstance(content, pd.DataFrame):
        return content.to_html(index=False)
    buffer = io.BytesIO()
    content.savefig(buffer, dpi=90, bbox_inches="tight")
    plt.close(content)  # the inline backend would show it a second time
    return f'<p><img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></p>'
