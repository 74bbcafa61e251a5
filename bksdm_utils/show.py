"""Everything that is drawn: sources as Markdown, picture grids, curves, feature maps, the U-Net's architecture."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from .costs import count
from .surgery import RemovalPlan, find_plan, free_plan, identity_plan, layers_per_stage, student_config

RESNET, ATTENTION, SAMPLER, MID = "#4c78a8", "#f2a541", "#9aa5b1", "#7b5ea7"


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
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.2), squeeze=False)
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
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
    """The curves of a running training: drawn again, and said in a line, every `every` seconds."""

    def __init__(self, max_train_steps: int, goal: float, every: float = 10.0):
        self.total, self.goal, self.every = max_train_steps, goal, every
        self.drawn, self.handle, self.first = 0.0, None, None

    def update(self, rows: Sequence[Mapping], validation: Sequence[Mapping]) -> None:
        """Call it after every step; most calls return at once.

        Args:
            rows: `engine.Step.floats` of every step so far.
            validation: rows of "step" and "clip_score".
        """
        now, last = time.monotonic(), rows[-1]
        if self.first is None:  # the estimate counts from the end of the first step, which is slower than the others
            self.first, self.drawn = (now, last["step"]), now
        if now - self.drawn < self.every:
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


def training_curves(rows: Sequence[Mapping], validation: Sequence[Mapping], goal: float) -> Figure:
    """The three losses, one line for each tap, and the proxy CLIP score (`goal` is the teacher's) over the steps."""
    steps = [row["step"] for row in rows]

    def series(names: Sequence[str]) -> dict:
        return {
            n.split("/")[-1].removeprefix("loss_"): list(zip(steps, smoothed([r[n] for r in rows]), strict=True))
            for n in names
        }

    losses = series(["loss_task", "loss_output", "loss_feature"])
    taps = series([name for name in rows[0] if name.startswith("feature/")])
    scored = [(v["step"], v["clip_score"]) for v in validation if v["clip_score"] == v["clip_score"]]  # NaN: no judge
    scores = {"EMA student": scored, "teacher": [(step, goal) for step, _ in scored]} if scored else {}
    panels = {"loss": losses, "feature loss of each tap": taps, "proxy CLIP score": scores}
    shown = {title: lines for title, lines in panels.items() if any(lines.values())}
    return curves(shown, log=("loss", "feature loss of each tap"), dashed=["teacher"])


def smoothed(values: Sequence[float], width: int = 10) -> list[float]:
    """Trailing mean, of as many values as there are where fewer than `width` precede."""
    total = np.cumsum([0.0, *values])
    return [float((total[i + 1] - total[max(0, i + 1 - width)]) / min(i + 1, width)) for i in range(len(values))]


def feature_map(activation: torch.Tensor) -> np.ndarray:
    """Root mean square over channels of one activation, (C, H, W) to (H, W)."""
    return activation.float().square().mean(0).sqrt().cpu().numpy()


def feature_maps(rows: Mapping[str, Sequence[torch.Tensor]], titles: Sequence[str]) -> Figure:
    """Activations (C, H, W) as heat maps; the maps of one column share their colour scale."""
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


def architecture(teacher_config: Mapping, *plans: str | RemovalPlan) -> Figure:
    """The teacher's U-Net and, beside it, one drawing for each plan with the removed blocks ghosted."""
    drawn = [identity_plan(teacher_config), *(find_plan(p) for p in plans)]
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.3 * len(drawn), 5.4), squeeze=False)
    for axis, plan in zip(axes[0], drawn, strict=True):
        draw_unet(axis, teacher_config, plan)
    figure.tight_layout()
    return figure


def draw_unet(axis: Axes, config: Mapping, plan: RemovalPlan) -> None:
    """Draws one U-Net: encoder at the left, decoder at the right, stages from the top down, the mid block below."""
    y, layers, channels = 0.0, layers_per_stage(config), config["block_out_channels"]
    for stage, pairs in enumerate(layers):
        kept = plan.stages[stage] if stage < len(plan.stages) else None
        down_attention = "CrossAttn" in config["down_block_types"][stage]
        up_attention = "CrossAttn" in config["up_block_types"][-1 - stage]
        for pair in range(pairs):
            _pair(axis, 0.0, y - pair * 0.44 - 0.24, down_attention, kept is not None and pair in kept.down)
        for pair in range(pairs + 1):
            _pair(axis, 3.0, y - (pairs - pair) * 0.44 - 0.02, up_attention, kept is not None and pair in kept.up)
        side = config["sample_size"] // 2**stage
        label = f"stage {stage}\n{side}×{side}\n{channels[stage]} ch"
        axis.text(2.2, y - pairs * 0.25, label, ha="center", va="center", fontsize=8, color="#555")
        y -= pairs * 0.5 + 0.38
        if stage < len(layers) - 1:
            survives = stage < len(plan.stages) - 1
            _box(axis, 0.0, y, 1.4, 0.2, SAMPLER, survives, "down")
            _box(axis, 3.0, y, 1.4, 0.2, SAMPLER, survives, "up")
            y -= 0.38
    if config.get("mid_block_type") is not None:
        _box(axis, 1.5, y, 1.4, 0.34, MID, plan.mid, "mid block")
    axis.set(xlim=(-0.15, 4.55), ylim=(y - 0.3, 0.5), title=plan.name)
    axis.axis("off")


def _pair(axis: Axes, x: float, y: float, attention: bool, kept: bool) -> None:
    _box(axis, x, y, 0.68 if attention else 1.4, 0.36, RESNET, kept, "res")
    if attention:
        _box(axis, x + 0.72, y, 0.68, 0.36, ATTENTION, kept, "attn")


def _box(axis: Axes, x: float, y: float, width: float, height: float, colour: str, kept: bool, label: str) -> None:
    style = {"facecolor": colour, "edgecolor": "white"} if kept else {"facecolor": "white", "edgecolor": "#b0b7c0"}
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", linewidth=1,
                       linestyle="-" if kept else (0, (3, 2)), **style)
    )  # fmt: skip
    axis.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=7,
              color="white" if kept else "#b0b7c0")  # fmt: skip


def plan_figure(teacher_config: Mapping, plan: RemovalPlan) -> Figure:
    """Teacher and one student side by side, under a line that says what the student saves."""
    teacher, student = count(teacher_config), count(student_config(teacher_config, plan))
    figure = architecture(teacher_config, plan)
    figure.suptitle(
        f"{student.params:,} parameters ({student.params / teacher.params:.0%} of the teacher), "
        f"{student.macs / 1e9:.2f} GMACs ({student.macs / teacher.macs:.0%})", fontsize=10
    )  # fmt: skip
    figure.tight_layout()
    return figure


def slider(draw: Callable[[int], Figure], name: str, values: Sequence[int]) -> None:
    """A slider over `values` that shows the figure `draw(value)`."""
    import ipywidgets as widgets
    from IPython.display import display

    def redraw(value: int) -> None:
        display(draw(value))
        plt.close("all")  # the inline backend would show the figure a second time

    chosen = widgets.SelectionSlider(options=list(values), description=name, continuous_update=False)
    display(widgets.VBox([chosen, widgets.interactive_output(redraw, {"value": chosen})]))


def plan_toggles(teacher_config: Mapping) -> None:
    """Tick boxes for a free plan; every change draws `plan_figure` again, or says why no student fits the plan."""
    import ipywidgets as widgets
    from IPython.display import display

    stages = len(teacher_config["block_out_channels"])
    pairs = [widgets.Checkbox(True, description=f"second pair in stage {s}", indent=False) for s in range(stages)]
    mid = widgets.Checkbox(True, description="mid block", indent=False)
    innermost = widgets.Checkbox(True, description="innermost stage", indent=False)

    def redraw(**ticked: bool) -> None:
        thin = [s for s in range(stages) if not ticked[f"stage{s}"]]
        plan = free_plan(teacher_config, thin, ticked["mid"], stages if ticked["innermost"] else stages - 1)
        try:
            display(plan_figure(teacher_config, plan))
        except ValueError as error:
            print(error)
        plt.close("all")  # the inline backend would show the figure a second time

    boxes = {f"stage{s}": box for s, box in enumerate(pairs)} | {"mid": mid, "innermost": innermost}
    display(widgets.HBox([widgets.VBox(list(boxes.values())), widgets.interactive_output(redraw, boxes)]))
