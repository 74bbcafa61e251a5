"""Controls above a figure or table, which is an output that pages without widgets have too (01, 03, 06 and 07)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from ..core.plans import RemovalPlan, free_plan, identity_plan
from .surgery import architecture


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
