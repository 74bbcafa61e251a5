from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import NARROW, NARROW_XL
from PIL import Image

from bksdm_utils.workbook.architecture import architecture, short
from bksdm_utils.workbook.figures import bars, curves, feature_map, image_grid, pareto_front, smoothed, tradeoff
from bksdm_utils.workbook.live import Live, training_curves
from bksdm_utils.workbook.widgets import explore, filtered, plan_toggles


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def ghosts(axis):
    return sum(patch.get_linestyle() not in ("-", "solid") for patch in axis.patches)


# Base: a resnet in each of four stages on both sides, an attention in three of them. Small: the mid block's two resnets
# and attention too. Tiny: the innermost stage's remaining resnets, one down and two up, and the sampler of each side.
# KOALA-700M: SDXL's thinned pairs hold 3 resnets a side and 2 + 10 transformer blocks; the mid block 12 boxes; five of
# ten blocks go in the three attentions left in stage 2.
@pytest.mark.parametrize(
    ("config", "variant", "removed"),
    [(NARROW, "bk_base", 14), (NARROW, "bk_small", 17), (NARROW, "bk_tiny", 22), (NARROW_XL, "koala_700m", 57)],
)
def test_removed_blocks_are_ghosted(config, variant, removed):
    teacher, student = architecture(config, variant).axes
    assert len(teacher.patches) == len(student.patches)
    assert (ghosts(teacher), ghosts(student)) == (0, removed)


def test_skip_connections_are_those_that_stay():
    teacher, student = architecture(NARROW, "bk_tiny").axes
    assert (len(teacher.lines), len(student.lines)) == (8, 3)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1_184, "1,184"), (8_685_156, "8.69 M"), (859_520_964, "860 M"),
                         (338_749_194_240, "339 G"), (2_989_918_781_440, "2,990 G")],
)  # fmt: skip
def test_counts_are_short(number, text):
    assert short(number) == text


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(1.0, 0.9), (0.5, 0.8), (0.6, 0.7), (0.5, 0.1), (0.2, 0.3), (0.9, 0.9)]
    assert pareto_front(points) == [(0.2, 0.3), (0.5, 0.8), (0.9, 0.9)]


def test_tradeoff_and_bars_draw_every_point():
    groups = {"teacher": {"t": {"score": 1.0, "MACs": 1.0, "latency": 1.0}},
              "plans": {"a": {"score": 0.5, "MACs": 0.6, "latency": 0.7}}}  # fmt: skip
    figure = tradeoff(groups, "score", named=("plans",))
    assert [axis.get_xlabel().split(",")[0] for axis in figure.axes] == ["MACs", "latency"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["a"]
    table = {"mid": {"harm": 1e-6, "saved": 0.1}, "outer": {"harm": 1.0, "saved": 0.2}}
    first, second = bars(table, percent=("saved",), log=("harm",)).axes
    assert first.get_xscale() == "log" and [bar.get_width() for bar in second.patches] == [0.1, 0.2]


def test_widgets_draw_again_or_say_why_not():
    drawn = []

    def draw(plan):
        drawn.append(plan)
        return curves({"y": {"line": [(0, 1), (1, 2)]}})

    with widgets_shown() as shown:
        plan_toggles(NARROW, draw)
    controls, picture = shown[0].children
    assert len(picture.children) == 2 and drawn[-1].mid
    mid = next(box for box in controls.children if box.description == "mid block")
    before = picture.children[0].value
    mid.value = False
    assert not drawn[-1].mid and picture.children[0].value != before
    with widgets_shown() as shown:
        plan_toggles(NARROW | {"block_out_channels": [8, 16, 32, 64]})
    controls, picture = shown[0].children
    controls.children[-1].value = False
    assert "would not fit" in picture.children[0].value


@contextmanager
def widgets_shown():
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", shown.append)
        yield shown


def test_a_grid_has_a_row_for_each_name_and_keeps_gaps_empty():
    picture = Image.new("RGB", (8, 8))
    figure = image_grid({"one": [picture] * 3, "two": [picture]}, ["a caption that is long enough to wrap twice"])
    assert len(figure.axes) == 6
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 1, 0, 0]
    assert "\n" in figure.axes[0].get_title()


def test_smoothing_is_a_trailing_mean():
    assert smoothed([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]


def test_a_feature_map_is_the_strength_over_channels():
    activation = torch.tensor([[[3.0]], [[4.0]]])
    assert feature_map(activation).item() == pytest.approx((12.5) ** 0.5)
    tokens = torch.arange(4.0)[:, None].expand(4, 3)  # self-attention: four places, three channels
    assert feature_map(tokens).tolist() == [[0, 1], [2, 3]]


def test_curves_without_a_judge_have_no_empty_panel():
    rows = [{"step": s, "loss_task": 1.0, "loss_output": 1.0, "loss_feature": 1.0, "feature/up": 1.0} for s in (1, 2)]
    nan = float("nan")
    unjudged = {"clip_score": nan, "fid": nan}
    assert len(training_curves(rows, [{"step": 0, **unjudged}], unjudged).axes) == 2
    scored = [{"step": s, "clip_score": 0.1 * s, "fid": 9.0 - s} for s in (0, 2)]
    titles = [axis.get_ylabel() for axis in training_curves(rows, scored, {"clip_score": 0.5, "fid": 1.0}).axes]
    assert titles == ["loss", "feature loss of each tap", "proxy CLIP score", "proxy FID"]


def test_a_finished_run_that_is_resumed_can_still_draw_its_curves():
    live = Live(max_train_steps=1, goal={"clip_score": 0.5, "fid": 1.0})
    row = {"step": 1, "loss_task": 1.0, "loss_output": 1.0, "loss_feature": 1.0}
    assert live.draw([row], [{"step": 1, "clip_score": 0.2, "fid": 3.0}]).axes


def test_controls_draw_again_and_say_what_is_wrong():
    import ipywidgets as widgets

    def draw(number, text):
        if number > 5:
            raise ValueError("too large: expected 5 or less")
        figure, axis = plt.subplots()
        axis.set_title(f"{number} {text}")
        return figure

    number, text = widgets.IntSlider(1, 0, 9), widgets.Text("x")
    with widgets_shown() as displayed:
        explore(draw, number, text)
    shown = displayed[0].children[1]
    first = shown.children[0].value
    number.value = 2
    second = shown.children[0].value
    text.value = "y"
    assert len({first, second, shown.children[0].value}) == 3
    number.value = 7
    assert "too large" in shown.children[0].value


def test_menus_choose_rows_of_a_table():
    table = pd.DataFrame({"preset": ["a", "a", "b"], "variant": ["x", "y", "x"], "score": [1.5, 2.5, 3.5]})
    with widgets_shown() as displayed:
        filtered(table, ["preset", "variant"])
        filtered(table.iloc[:0], ["preset"])
    controls, shown = displayed[0].children
    preset, variant = controls.children
    assert all(score in shown.children[0].value for score in ("1.5", "2.5", "3.5"))
    preset.value = "a"
    assert "2.5" in shown.children[0].value and "3.5" not in shown.children[0].value
    variant.value = "x"
    assert "1.5" in shown.children[0].value and "2.5" not in shown.children[0].value
    assert displayed[1].children[0].children[0].options == ("all",)
