"""Figures, progress and widgets."""

import matplotlib

matplotlib.use("Agg")

import time

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import NARROW, NARROW_XL
from IPython.display import HTML
from PIL import Image

from bksdm_utils.core.plans import named_plans, student_config
from bksdm_utils.evaluation.folders import Progress
from bksdm_utils.evaluation.prompts import Prompt
from bksdm_utils.workbook import live
from bksdm_utils.workbook.figures import (
    bars,
    error_bars,
    feature_map,
    feature_maps,
    image_grid,
    pareto_front,
    show,
    smoothed,
    tradeoff,
)
from bksdm_utils.workbook.surgery import architecture, short


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


class Outputs(list):
    """Replaces IPython's `display`: what each output of a cell shows at present."""

    def __call__(self, content=None, display_id=False):
        self.append(content)
        number = len(self) - 1

        class Handle:
            def update(_, content):
                self[number] = content

        return Handle() if display_id else None


@pytest.fixture
def outputs(monkeypatch):
    outputs = Outputs()
    monkeypatch.setattr(live, "display", outputs)
    return outputs


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def dashed(axis):
    return sum(patch.get_linestyle() not in ("-", "solid") for patch in axis.patches)


# Base: a resnet in each of four stages on both sides, an attention in three of them. Small: the mid block's two resnets
# and attention too. Tiny: the innermost stage's remaining resnets, one down and two up, and the sampler of each side.
# KOALA-700M: SDXL's thinned pairs hold 3 resnets a side and 2 + 10 transformer blocks; the mid block 12 boxes; five of
# ten blocks go in the three attentions left in stage 2.
@pytest.mark.parametrize(
    ("config", "removed", "skips"),
    [(NARROW, {"bk_base": 14, "bk_small": 17, "bk_tiny": 22}, [8, 4, 4, 3]),
     pytest.param(NARROW_XL, {"koala_700m": 57}, [6, 3], marks=pytest.mark.slow)],
)  # fmt: skip
def test_removed_blocks_are_dashed_and_their_skip_connections_left_out(config, removed, skips):
    axes = architecture(config, *removed).axes
    assert len({len(axis.patches) for axis in axes}) == 1
    assert [dashed(axis) for axis in axes] == [0, *removed.values()]
    assert [len(axis.lines) for axis in axes] == skips


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1_184, "1,184"), (8_685_156, "8.69 M"), (859_520_964, "860 M"),
                         (338_749_194_240, "339 G"), (2_989_918_781_440, "2,990 G")],
)  # fmt: skip
def test_counts_are_short(number, text):
    assert short(number) == text


def test_source_code_is_shown_with_its_file(monkeypatch):
    shown = Outputs()
    monkeypatch.setattr("bksdm_utils.workbook.figures.display", shown)
    show(smoothed)
    assert "bksdm_utils/workbook/figures.py" in shown[0].data and "def smoothed(" in shown[0].data


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(1.0, 0.9), (0.5, 0.8), (0.6, 0.7), (0.5, 0.1), (0.2, 0.3), (0.9, 0.9)]
    assert pareto_front(points) == [(0.2, 0.3), (0.5, 0.8), (0.9, 0.9)]


def test_tradeoff_has_a_panel_for_each_cost_and_names():
    groups = {"teacher": {"t": {"score": 1.0, "MACs": 1.0, "latency": 1.0}},
              "plans": {"a": {"score": 0.5, "MACs": 0.6, "latency": 0.7}}}  # fmt: skip
    figure = tradeoff(groups, "score", named=("plans",))
    assert [axis.get_xlabel().split(",")[0] for axis in figure.axes] == ["MACs", "latency"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["a"]


def test_bars_and_error_bars_have_a_panel_for_each_column():
    table = {"mid": {"harm": 1e-6, "saved": 0.1}, "outer": {"harm": 1.0, "saved": 0.2}}
    first, second = bars(table, percent=("saved",), log=("harm",)).axes
    assert first.get_xscale() == "log" and [bar.get_width() for bar in second.patches] == [0.1, 0.2]
    assert [label.get_text() for label in first.get_yticklabels()] == ["mid", "outer"]
    scores = {"teacher": {"fid": (1.0, 0.1)}, "student": {"fid": (2.0, 0.1), "distance": (3.0, 0.2)}}
    fid, distance = error_bars(scores).axes
    assert (len(fid.containers), len(distance.containers)) == (2, 1)


def test_a_grid_has_a_row_for_each_name_and_keeps_gaps_empty():
    image = Image.new("RGB", (8, 8))
    figure = image_grid({"one": [image] * 3, "two": [image]}, ["a caption that is long enough to wrap twice"])
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 1, 0, 0]
    assert "\n" in figure.axes[0].get_title()
    assert image_grid({"": [image]}).axes


def test_smoothing_is_a_trailing_mean():
    assert smoothed([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]


def test_a_feature_map_is_the_root_mean_square_over_channels():
    activation = torch.tensor([[[3.0]], [[4.0]]])
    assert feature_map(activation).item() == pytest.approx((12.5) ** 0.5)
    tokens = torch.arange(4.0)[:, None].expand(4, 3)  # self-attention: four positions, three channels
    assert feature_map(tokens).tolist() == [[0, 1], [2, 3]]
    figure = feature_maps({"teacher": [activation, tokens], "student": [activation, 2 * tokens]}, ["a", "b"])
    assert [axis.images[0].get_clim()[1] for axis in figure.axes[1::2]] == [6, 6]


def test_curves_without_a_metric_network_have_no_empty_panel(outputs):
    rows = [{"step": s, "loss_task": 1.0, "loss_output": 1.0, "loss_feature": 1.0, "feature/up": 1.0} for s in (1, 2)]
    nan = float("nan")
    unscored = {"clip_score": nan, "fid": nan}
    assert len(live.Live(2, unscored).draw(rows, [{"step": 0, **unscored}]).axes) == 2
    scored = [{"step": s, "clip_score": 0.1 * s, "fid": 9.0 - s} for s in (0, 2)]
    figure = live.Live(2, {"clip_score": 0.5, "fid": 1.0}).draw(rows, scored)
    titles = [axis.get_ylabel() for axis in figure.axes]
    assert titles == ["loss", "feature loss of each tap", "validation CLIP score", "validation FID"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["task", "output", "feature"]


ROW = {"loss": 1.0, "loss_task": 1.0, "loss_output": 1.0, "loss_feature": 1.0}


def test_a_finished_run_that_is_resumed_still_has_its_curves(outputs):
    follow = live.Live(max_train_steps=1, goal={"clip_score": 0.5, "fid": 1.0})
    assert follow.draw([{"step": 1, **ROW}], [{"step": 1, "clip_score": 0.2, "fid": 3.0}]).axes


@pytest.mark.parametrize(("steps", "lines"), [(5, 4), (400, 12), (50_000, 12)])
def test_a_run_of_any_length_prints_a_dozen_lines_with_the_time_left(outputs, capsys, clock, steps, lines):
    follow = live.Live(steps, goal={})
    follow.figure.every = float("inf")
    for step in range(1, steps + 1):
        clock[0] = 2.0 * step
        follow.update([{"step": step, **ROW}], [])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert printed[-1] == f"step {steps:,} of {steps:,}: loss 1.0000, finished"
    if steps == 400:
        assert printed[0] == "step 34 of 400: loss 1.0000, 0:12:12 left"


def images_of(name, done, total, colour):
    return name, Progress(done, total, ((Prompt("0", name), Image.new("RGB", (8, 8), colour)),))


def test_a_gallery_says_how_long_it_still_takes(outputs, capsys, clock):
    gallery = live.Gallery()
    for clock[0], done in ((0, 200), (60, 260), (120, 1000)):  # 200 existed before
        gallery.update("teacher", Progress(done, 1000))
    assert capsys.readouterr().out.splitlines() == [
        "teacher: 260 of 1,000 images, 0:12:20 left", "teacher: 1,000 of 1,000 images, finished"]  # fmt: skip


def test_a_gallery_ends_with_the_last_model_under_its_own_name(outputs, clock):
    gallery, other = live.Gallery(2), live.Gallery()
    gallery.update(*images_of("teacher", 4, 4, "red"))
    gallery.update(*images_of("student", 2, 4, "red"))  # too soon after the first
    assert outputs[0].axes[0].get_title() == "teacher"
    gallery.update(*images_of("student", 4, 4, "red"))
    other.update(*images_of("guidance 8", 4, 4, "red"))
    assert [figure.axes[0].get_title() for figure in outputs] == ["student", "guidance 8"]


def test_folders_share_the_lines(outputs, capsys):
    gallery = live.Gallery(folders=4)
    for name in "abcd":
        for done in range(101):
            gallery.update(name, Progress(done, 100))
    assert len(capsys.readouterr().out.splitlines()) == 12


def plot(title):
    figure, axis = plt.subplots()
    axis.set_title(title)
    return figure


def test_controls_replace_the_figure_and_say_what_is_wrong(outputs):
    def draw(number, text):
        if number > 5:
            raise ValueError("too large: <expected> 5 or less")
        return plot(f"{number} {text}")

    number, text = ipywidgets.IntSlider(1, 0, 9), ipywidgets.Text("x")
    live.explore(draw, number, text)
    pages = [outputs[1].data]
    number.value = 2
    pages.append(outputs[1].data)
    text.value = "y"
    pages.append(outputs[1].data)
    assert len(set(pages)) == 3 and all(page.startswith('<p><img src="data:image/png') for page in pages)
    number.value = 7
    assert "too large: &lt;expected&gt;" in outputs[1].data and len(outputs) == 2


def test_plan_toggles_begin_with_the_runs_plan(outputs, monkeypatch):
    plans = []

    def draw(plan):
        plans.append(plan)
        return plot(plan.name)

    monkeypatch.setattr(live, "architecture", lambda config, plan: plot("architecture"))
    small = named_plans(NARROW)["bk_small"]
    live.plan_toggles(NARROW, small, draw)
    boxes = {box.description: box for box in outputs[0].children}
    assert plans[-1] == small and outputs[1].data.count("<img") == 2
    boxes["second pair in stage 1"].value = True
    assert len(plans[-1].stages[1].down) == 2 and len(plans[-1].stages[0].down) == 1


def test_plan_toggles_say_why_no_student_can_follow(outputs, monkeypatch):
    monkeypatch.setattr(
        live, "architecture", lambda config, plan: plot(str(student_config(config, plan)["layers_per_block"]))
    )
    config = NARROW | {"block_out_channels": [8, 16, 32, 64]}
    live.plan_toggles(config, named_plans(config)["bk_small"])
    outputs[0].children[-1].value = False
    assert isinstance(outputs[1], HTML) and "<img" not in outputs[1].data and "innermost" in outputs[1].data


def test_menus_choose_rows_of_a_table_that_is_shown_whole(outputs):
    table = pd.DataFrame({"preset": ["a", "a", "b"], "variant": ["x", "y", "x"], "score": [1.5, 2.5, 3.5]})
    live.filtered(table, ["preset", "variant"])
    preset, variant = outputs[0].children
    assert all(score in outputs[1].data for score in ("1.5", "2.5", "3.5"))
    preset.value = "a"
    assert "2.5" in outputs[1].data and "3.5" not in outputs[1].data
    variant.value = "x"
    assert "1.5" in outputs[1].data and "2.5" not in outputs[1].data
    live.filtered(table.iloc[:0], ["preset"])
    assert outputs[2].children[0].options == ("all",)


def test_wide_tables_are_shown_whole():
    text = pd.DataFrame({f"column {i}": ["words " * 30] for i in range(40)}).to_html()
    assert "..." not in text and "…" not in text
