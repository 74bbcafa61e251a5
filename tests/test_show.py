import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import NARROW
from PIL import Image

from bksdm_utils import show, surgery


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def ghosts(axis):
    return sum(patch.get_linestyle() not in ("-", "solid") for patch in axis.patches)


# Base: a resnet in each of four stages on both sides, an attention in three of them. Small: the mid block too. Tiny:
# the innermost stage's remaining resnets, one down and two up, and the sampler of each side.
@pytest.mark.parametrize(("variant", "removed"), [("bk_base", 14), ("bk_small", 15), ("bk_tiny", 20)])
def test_removed_blocks_are_ghosted(variant, removed):
    teacher, student = show.architecture(NARROW, variant).axes
    assert len(teacher.patches) == len(student.patches)
    assert (ghosts(teacher), ghosts(student)) == (0, removed)


def test_a_grid_has_a_row_for_each_name_and_keeps_gaps_empty():
    picture = Image.new("RGB", (8, 8))
    figure = show.image_grid({"one": [picture] * 3, "two": [picture]}, ["a caption that is long enough to wrap twice"])
    assert len(figure.axes) == 6
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 1, 0, 0]
    assert "\n" in figure.axes[0].get_title()


def test_smoothing_is_a_trailing_mean():
    assert show.smoothed([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]


def test_a_feature_map_is_the_strength_over_channels():
    activation = torch.tensor([[[3.0]], [[4.0]]])
    assert show.feature_map(activation).item() == pytest.approx((12.5) ** 0.5)


def test_curves_without_a_judge_have_no_empty_panel():
    rows = [{"step": s, "loss_task": 1.0, "loss_output": 1.0, "loss_feature": 1.0, "feature/up": 1.0} for s in (1, 2)]
    nan = float("nan")
    assert len(show.training_curves(rows, [{"step": 0, "clip_score": nan}], nan).axes) == 2
    figure = show.training_curves(rows, [{"step": 0, "clip_score": 0.1}, {"step": 2, "clip_score": 0.4}], 0.5)
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "feature loss of each tap", "proxy CLIP score"]


def test_a_finished_run_that_is_resumed_can_still_draw_its_curves():
    live = show.Live(max_train_steps=1, goal=0.5)
    row = {"step": 1, "loss_task": 1.0, "loss_output": 1.0, "loss_feature": 1.0}
    assert live.draw([row], [{"step": 1, "clip_score": 0.2}]).axes


def test_the_figure_behind_the_toggles_takes_any_plan():
    plan = surgery.free_plan(NARROW, thin=[0, 1], mid=False, stages=3)
    assert "own plan" in show.plan_figure(NARROW, plan).axes[1].get_title()
