"""Removal plans by name or from .json files, as the parameter `variant` names them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..core.plans import RemovalPlan, check_variant, resolve_plan
from ..files import looked_in, resolve


def find_plan(variant: str | RemovalPlan, teacher_config: Mapping) -> RemovalPlan:
    """A plan by the name of a variant, from a .json file that `RemovalPlan.to_json` wrote, or itself.

    Raises:
        ValueError: the name is unknown, or the file is missing or malformed.
    """
    return _read(variant) if str(variant).endswith(".json") else resolve_plan(variant, teacher_config)


def plan_name(variant: str) -> str:
    """The name of the plan that `find_plan` would find, without a teacher; raises the same."""
    return _read(variant).name if variant.endswith(".json") else check_variant(variant)


def read_plan(text: str) -> RemovalPlan:
    """A plan from JSON: {"name": "mine", "stages": [{"down": [0], "up": [0, 2], "depth": null}, …], "mid": true}.

    Raises:
        ValueError: the text is no plan; every fault is named.
    """
    try:
        return TypeAdapter(RemovalPlan).validate_json(text)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc'])) or 'the text'}: {f['msg']}" for f in error.errors())
        raise ValueError(f"not a removal plan ({faults}): write it with RemovalPlan.to_json()") from None


def _read(path: str) -> RemovalPlan:
    file = Path(resolve(path))
    if not os.path.isfile(file):
        raise ValueError(f"{path} is missing: write a plan there with RemovalPlan.to_json() ({looked_in(path)})")
    return read_plan(file.read_text(encoding="utf-8"))
