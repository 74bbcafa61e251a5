"""Widgets that stand on functions which also draw a static figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from ..core.plans import RemovalPlan, free_plan
from .architecture import architecture
from .figures import _png


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
