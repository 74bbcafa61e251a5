"""Tables over the result.json files of finished runs (notebook 07)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from .parameters import find_notebook

PARTS = ("notebook", "preset", "variant", "config", "metrics", "provenance")


def collect(runs_dir: Path) -> tuple[list[dict], list[tuple[str, str]]]:
    """Every result.json below a folder, oldest first, each with its `folder`; and (path, reason) of what is set aside:
    files that cannot be read, and results of other versions of a notebook."""
    results, set_aside = [], []
    for path in sorted(runs_dir.glob("*/*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            missing = [part for part in PARTS if part not in result]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}")
            kind = find_notebook(result["notebook"])[1]
            kind(**result["config"])  # parameters that the notebook does not have are an error
            results.append(result | {"folder": f"{path.parent.parent.name}/{path.parent.name}"})
        except (OSError, ValueError) as error:
            set_aside.append((str(path), str(error)))
    return sorted(results, key=lambda result: result["provenance"]["started"]), set_aside


def changed(result: Mapping, free: Collection[str] = ()) -> str:
    """The parameters of a run that differ from its notebook's and preset's defaults: "batch_size 8, seed 1".

    Args:
        free: parameters that are left out.
    """
    kind = find_notebook(result["notebook"])[1]
    preset = {"preset": result["preset"]} if "preset" in kind.model_fields else {}
    defaults = (kind.filled(**preset) if preset else kind()).model_dump(mode="json")
    return ", ".join(f"{name} {value}" for name, value in result["config"].items()
                     if name not in free and value != defaults[name])  # fmt: skip
