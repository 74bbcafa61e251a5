"""The notebooks by number, their parameter classes, and the parameters cells and help texts made from these."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic.fields import FieldInfo

from ..config.base import Config, heading_of
from ..config.deploy import DemoAndExport
from ..config.dreambooth import DreamBoothTraining
from ..config.evaluation import CocoEvaluation, Results
from ..config.surgery import ArchitectureSurgery, StorybookWorld, WeightCopying
from ..config.training import KDTraining
from ..files import ROOT

NOTEBOOKS = ROOT / "notebooks"
CLASSES: dict[str, type[Config]] = {
    kind.notebook[:2]: kind
    for kind in (StorybookWorld, ArchitectureSurgery, WeightCopying, KDTraining, CocoEvaluation, DreamBoothTraining,
                 DemoAndExport, Results)
}  # fmt: skip


def find_notebook(name: str) -> tuple[Path, type[Config]]:
    """A notebook's path and parameter class by its number, name or path: "03" is notebooks/03_kd_training.ipynb.

    Raises:
        ValueError: there is no such notebook.
    """
    kind = CLASSES.get(Path(name).name[:2])
    if kind is None or not f"{kind.notebook}.ipynb".startswith(Path(name).name):
        known = ", ".join(kind.notebook for kind in CLASSES.values())
        raise ValueError(f"unknown notebook {name!r}: expected all or one of {known}")
    return NOTEBOOKS / f"{kind.notebook}.ipynb", kind


def literal(field: FieldInfo) -> str:
    """A default as the parameters cell writes it: lists are texts with commas."""
    if isinstance(field.default, tuple):
        return '"' + ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in field.default) + '"'
    return repr(field.default).replace("'", '"')


def parameters_cell(kind: type[Config]) -> str:
    """The source of a notebook's parameters cell: name, default and description of every parameter, in groups."""
    return _lines(kind, lambda name, field: f"{name} = {literal(field)}  # {field.description}", "# --- ")


def parameters_help(kind: type[Config]) -> str:
    """The same as help text."""
    return _lines(kind, lambda name, field: f"  {name:<28} {field.description} [{literal(field)}]", " ")


def _lines(kind: type[Config], line: Callable[[str, FieldInfo], str], mark: str) -> str:
    """A line for each parameter, the heading of its group above the first."""
    lines = []
    for name, field in kind.model_fields.items():
        if heading := heading_of(field):
            lines.append(mark + heading)
        lines.append(line(name, field))
    return "\n".join(lines)


def assigned_parameters(sources: Iterable[str], kind: type[Config]) -> set[str]:
    """The names assigned in parameters cells: cells of nothing but literals, some of them parameters of this class."""
    names: set[str] = set()
    for source in sources:
        try:
            assigned = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}
        except (SyntaxError, ValueError, AttributeError):
            continue
        if assigned.keys() & kind.model_fields.keys():
            names |= assigned.keys()
    return names
