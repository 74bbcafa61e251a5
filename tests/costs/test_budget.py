"""Plans from a budget: within it, of the least predicted loss, and no worse than others when measured."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from bksdm_utils.config.presets import PRESETS
from bksdm_utils.config.surgery import ArchitectureSurgery
from bksdm_utils.core.losses import prediction_distance
from bksdm_utils.core.plans import attention_depths, identity_plan, layers_per_stage, named_plans
from bksdm_utils.core.surgery import build_student
from bksdm_utils.costs import budget
from bksdm_utils.evaluation.scorer import Scorer
from bksdm_utils.models.configs import model_config
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.encoding import probe_inputs
from bksdm_utils.workbook.surgery import RemovalScan


def rough_count(config):
    """Costs by a formula, in no time: what each pair and the mid block would cost."""
    widths, layers, depths = config["block_out_channels"], layers_per_stage(config), attention_depths(config)
    pairs = [(2 * n + 1) * width**2 * (1 + depth) for n, width, depth in zip(layers, widths, depths, strict=True)]
    pairs.append(3 * widths[-1] ** 2 * (config.get("mid_block_type", "") is not None))
    macs = [cost / 4 ** min(number, len(widths) - 1) for number, cost in enumerate(pairs)]
    return SimpleNamespace(params=sum(pairs), macs=sum(macs))


def loss_of(plan):
    return random.Random(str(plan)).random()


@pytest.fixture(params=["storybook", "sd-v1.4", "sdxl-base"])
def search(request, monkeypatch):
    monkeypatch.setattr(budget, "count", rough_count)
    return budget.BudgetSearch(model_config(PRESETS[request.param].configs), loss_of)


@pytest.mark.parametrize("kind", budget.COSTS)
def test_a_plan_is_within_its_budget_and_the_best_of_the_least_sums(search, kind):
    rng = random.Random(0)
    cheapest = min(search.share(plan, kind) for _, _, plan in search.choices)
    for share in [rng.uniform(cheapest, 1) for _ in range(10)]:
        found = search.within(kind, share)
        allowed = [(loss, plan) for loss, _, plan in search.choices if search.share(plan, kind) <= share]
        best = min((loss_of(plan), predicted) for predicted, plan in allowed[: budget.MEASURED])
        if not search.config.get("addition_embed_type"):  # in SDXL what is counted as near need not be within
            assert (found.measured, found.predicted) == best
        assert found.share <= share and found.share == search.share(found.plan, kind)
        assert found.plan.name == f"budget_{kind}_{share:g}" and found.predicted == search.predicted(found.plan)


def test_every_choice_fits_and_none_stands_twice(search):
    plans = [plan for _, _, plan in search.choices]
    assert all(plan.check(search.config) is None for plan in plans) and len(set(plans)) == len(plans)
    assert {plan.stages for plan in named_plans(search.config).values() if not search.config.get("addition_embed_type")
            } <= {plan.stages for plan in plans}  # fmt: skip


def test_depths_of_sdxl_are_chosen_too(monkeypatch):
    monkeypatch.setattr(budget, "count", rough_count)
    search = budget.BudgetSearch(model_config(PRESETS["sdxl-base"].configs), loss_of)
    assert {plan.stages[2].depth for _, _, plan in search.choices} == {None, *range(1, 10)}


def test_a_budget_that_nobody_can_meet_names_the_cheapest_plan(search):
    with pytest.raises(ValueError, match=r"budget macs:0.01: .* the cheapest has 0\.\d+ of its macs"):
        search.within("macs", 0.01)


def test_a_named_plan_that_no_search_could_find_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(budget, "count", rough_count)
    config = {**model_config(PRESETS["storybook"].configs), "layers_per_block": 3}
    one = named_plans(config)["bk_base"]  # keeps one pair of three in each stage
    search = budget.BudgetSearch(config, loss_of)
    scan = SimpleNamespace(distance=loss_of)
    assert math.isnan(search.predicted(one))
    rows = RemovalScan.budgeted(scan, search, {"bk_base": one, "teacher": identity_plan(config)}, None)
    assert [row["beside"] for row in rows] == ["", "", "teacher"] and RemovalScan.searched_lose_less(rows[:2])


@pytest.mark.parametrize("text", ["macs:0.6", "params:.5", "macs:1", "macs:1.0"])
def test_budgets_are_read(text):
    assert ArchitectureSurgery(budget=text).budget == text


@pytest.mark.parametrize("text", ["macs", "macs:", "flops:0.5", "macs:0", "macs:0.0", "macs:1.5", "macs:60%", "0.6"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="budget.*macs:0.6"):
        ArchitectureSurgery(budget=text)


@pytest.mark.nightly
def test_measured_losses_are_no_worse_than_those_of_the_papers_and_of_random_plans():
    pipeline, scorer = load_pipeline("data/storybook/teacher"), Scorer(ArchitectureSurgery.filled())
    probes = probe_inputs(pipeline, scorer.sample(pipeline)[:4], scorer.captions[:4], seed=0)[1::2]

    @torch.no_grad()
    def measured(plan):
        return prediction_distance(pipeline.unet, build_student(pipeline.unet, plan).eval(), probes)

    search = budget.BudgetSearch(pipeline.unet.config, measured)
    for plan in named_plans(search.config).values():
        found = search.within("macs", search.share(plan, "macs"))
        assert measured(found.plan) <= measured(plan)
    rng = random.Random(0)
    chosen = [(plan, search.share(plan, "macs"), measured(plan)) for *_, plan in rng.sample(search.choices, 100)]
    for share in [rng.uniform(0.6, 0.95) for _ in range(10)]:
        found = search.within("macs", share)
        best = min(loss for _, cost, loss in chosen if cost <= share)
        assert found.share <= share and measured(found.plan) <= 1.1 * best
