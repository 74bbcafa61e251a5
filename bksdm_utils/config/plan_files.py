"""Removal plans by name or from .json files, as the parameter `variant` names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..core.plans import RemovalPlan, check_variant, resolve_plan
from ..files import resolve


def find_plan(variant: str | RemovalPlan, teacher_config: Mapping) -> RemovalPlan:
    """A plan by the name of a variant, from a .json file that `RemovalPlan.to_json` wrote, or itself.

    Raises:
        ValueError: the name is unknown, or the file is missing or malformed.
    """
    return _read(variant) if str(variant).endswith(".json") else resolve_plan(variant, teacher_config)


def plan_name(variant: str) -> str:
    """The name of the plan that `variant` leads to, without a teacher.

    Raises:
        ValueError: as `find_plan`.
    """
    return _read(variant).name if variant.endswith(".json") else check_variant(variant)


def _read(variant: str) -> RemovalPlan:
    path = Path(resolve(variant))
    if not path.is_file():
        raise ValueError(f"{variant} is missing: write a plan there with RemovalPlan.to_json()")
    return RemovalPlan.from_json(path.read_text(encoding="utf-8"))
