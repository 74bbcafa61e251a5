"""A plan from a budget: of all plans that cost no more, the one whose removals lose least by themselves (notebook 01).

The criterion is LAPTOP-Diff's (arXiv 2404.11098): the output loss of several removals is predicted by the sum of the
output losses of each alone. Plans are few enough to be tried all, thousands in SDXL, so nothing is left to a heuristic;
and because losses do not quite add up, the best 64 are measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from operator import itemgetter
from typing import NamedTuple

from ..core.plans import RemovalPlan, fits, identity_plan, removals, student_config
from .counting import Costs, count

COSTS = ("params", "macs")  # what a budget may limit, as `counting.Costs` names them
MEASURED = 64  # plans of the least predicted loss, of which the best is taken
SLACK = 1e-9  # of the teacher's cost; savings add up, or in SDXL, whose units overlap, to more than is saved


class Found(NamedTuple):
    """A plan, its share of the teacher's cost, the output loss that the sum predicts, and the measured one."""

    plan: RemovalPlan
    share: float
    predicted: float
    measured: float


def parts(config: Mapping) -> list[dict[str, RemovalPlan]]:
    """What can be removed, by parts of the U-Net of which one removal each can be chosen: unit -> plan without it.

    Mid block and innermost stage are one part: what the first costs depends on whether the second is there.
    """
    whole, grouped = identity_plan(config), defaultdict(dict)
    for unit, plan in removals(config, whole).items():
        part, _, what = unit.partition(": ")
        if what.startswith("depth"):
            grouped[f"{part} depth"] |= {unit: plan, **_shallower(config, plan, part)}
        else:
            grouped[part if what else "middle"][unit] = plan
    if "innermost stage" in (middle := grouped["middle"]):
        both = removals(config, middle["innermost stage"])
        middle |= {f"innermost stage, {unit}": plan for unit, plan in both.items() if unit == "mid block"}
    return [part for part in grouped.values() if part]


def _shallower(config: Mapping, plan: RemovalPlan, stage: str) -> dict[str, RemovalPlan]:
    """The plans without still more of a stage's transformer blocks."""
    found = {}
    while further := [(u, p) for u, p in removals(config, plan).items() if u.startswith(f"{stage}: depth")]:
        (unit, plan), *_ = further
        found[unit] = plan
    return found


def joint(whole: RemovalPlan, plans: Sequence[RemovalPlan]) -> RemovalPlan:
    """The plan that removes what any of the plans removes."""
    count = min([len(whole.stages), *(len(plan.stages) for plan in plans)])
    stages = []
    for number in range(count):
        stage, *others = (plan.stages[number] for plan in (whole, *plans))
        for other in others:
            stage = replace(stage, down=tuple(p for p in stage.down if p in other.down),
                            up=tuple(p for p in stage.up if p in other.up),
                            depth=min(filter(None, (stage.depth, other.depth)), default=None))  # fmt: skip
        stages.append(stage)
    return RemovalPlan("joint", tuple(stages), all(plan.mid for plan in (whole, *plans)))


class BudgetSearch:
    """Finds plans for one teacher; of each stage at most one pair goes, as in the paper.

    Args:
        config: of the teacher's U-Net.
        loss: the output loss of a plan, as measured before any training.
    """

    def __init__(self, config: Mapping, loss: Callable[[RemovalPlan], float]):
        self.config, self.teacher, alternatives = config, count(config), parts(config)
        self.loss, self.cost = cache(loss), cache(lambda plan: count(student_config(config, plan)))
        units = {unit: plan for part in alternatives for unit, plan in part.items()}
        costs = {unit: self.cost(plan) for unit, plan in units.items()}
        losses = {unit: self.loss(plan) for unit, plan in units.items()}
        self.choices = []  # (predicted loss, kind -> estimated share, plan), the least loss first
        for units_of, plan in _fitting(config, alternatives, units):
            shares = {kind: 1 - sum(1 - self._of(costs[unit], kind) for unit in units_of) for kind in COSTS}
            self.choices.append((sum(losses[unit] for unit in units_of), shares, plan))
        self.choices.sort(key=itemgetter(0))

    def _of(self, costs: Costs, kind: str) -> float:
        return getattr(costs, kind) / getattr(self.teacher, kind)

    def share(self, plan: RemovalPlan, kind: str) -> float:
        """What a plan costs, of the teacher's cost."""
        return self._of(self.cost(replace(plan, name="joint")), kind)

    def predicted(self, plan: RemovalPlan) -> float:
        """The sum of the output losses of what a plan removes, each alone; NaN if it removes two pairs of a stage."""
        plan = replace(plan, name="joint")
        return next((loss for loss, _, other in self.choices if other == plan), float("nan"))

    def within(self, kind: str, budget: float) -> Found:
        """Of the `MEASURED` plans of the least predicted loss that cost at most `budget` of the teacher's `kind`, the
        one of the least measured loss.

        Raises:
            ValueError: no plan is as cheap; the cheapest share is named.
        """
        near = [(loss, plan) for loss, shares, plan in self.choices if shares[kind] <= budget + SLACK]
        for first in range(0, len(near), MEASURED):
            for loss, plan in sorted(near[first : first + MEASURED], key=lambda choice: self.loss(choice[1])):
                if (share := self.share(plan, kind)) <= budget:
                    return Found(replace(plan, name=f"budget_{kind}_{budget:g}"), share, loss, self.loss(plan))
        cheapest = min(self.choices, key=lambda choice: choice[1][kind])[-1]
        raise ValueError(f"budget {kind}:{budget:g}: no plan of this teacher costs so little; the cheapest has "
                         f"{self.share(cheapest, kind):.3f} of its {kind}")  # fmt: skip


def _fitting(
    config: Mapping, alternatives: Sequence[Mapping[str, RemovalPlan]], units: Mapping[str, RemovalPlan]
) -> Iterator[tuple[list[str], RemovalPlan]]:
    """Every choice of at most one unit in each part that makes a plan, and that plan."""
    whole = identity_plan(config)
    innermost = f"stage {len(whole.stages) - 1}:"  # gone with the stage
    for choice in product(*([None, *part] for part in alternatives)):
        chosen = [unit for unit in choice if unit]
        names = "; ".join(chosen)
        if "innermost stage" in names and innermost in names:
            continue
        if fits(plan := joint(whole, [units[unit] for unit in chosen]), config):
            yield chosen, plan
