"""The parameters of the notebooks."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path

from ..config.presets import PRESETS, find_preset
from ..core.plans import RemovalPlan, find_plan
from ..files import ROOT

NOTEBOOKS = ROOT / "notebooks"


# Parameters that are lists: a comma is part of one value.
LISTS = ("students", "guidances", "models", "methods", "lora_targets", "lora_text_targets", "few_steps", "formats",
         "trackers")  # fmt: skip


def find_notebook(name: str) -> Path:
    """A notebook by path, file name, full stem or number: "03" is notebooks/03_kd_training.ipynb."""
    known = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    for path in known:
        if name in (path.stem, path.name, path.stem.split("_")[0]) or Path(name).resolve() == path:
            return path
    raise ValueError(f"unknown notebook {name!r}: expected all or one of {', '.join(p.stem for p in known)}")


def parameters_of(notebook: Path) -> dict[str, object]:
    """The names and default values of a notebook's parameters cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    if not tagged:
        raise ValueError(f"{notebook.name} has no cell tagged parameters")
    tree = ast.parse("".join(tagged[0]["source"]))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}


def check_parameters(notebook: Path, given: Mapping[str, object]) -> None:
    """Raises ValueError, naming what is known, for a parameter, preset, variant or plan file that is not."""
    known = parameters_of(notebook)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(unknown)}: it knows {', '.join(known)}")
    if given.get("preset") is not None and given["preset"] not in PRESETS:
        raise ValueError(f"unknown preset {given['preset']!r}: expected one of {', '.join(PRESETS)}")
    if given.get("variant") is not None:
        requested_plan(given)


def literal(text: str) -> object:
    """A value typed on the command line: a Python literal, true, false, none, or else a string."""
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def requested_plan(parameters: Mapping[str, object]) -> RemovalPlan | None:
    """The removal plan that a notebook's parameters ask for: by name, from a .json file, or the preset's."""
    if "variant" not in parameters:
        return None
    return find_plan(parameters["variant"] or find_preset(parameters.get("preset", "storybook")).variant)
