"""What notebooks 01 and 02 gather."""

from types import SimpleNamespace

import pytest
import torch
from conftest import NARROW
from PIL import Image

from bksdm_utils.core.copying import copy_report, empty_unet, weight_map
from bksdm_utils.core.plans import named_plans, removals, student_config
from bksdm_utils.costs.counting import count, unet_inputs
from bksdm_utils.costs.measuring import Latency
from bksdm_utils.workbook import surgery
from bksdm_utils.workbook.surgery import RemovalScan, Timing, blocks_table, costs_table, map_by_module, time_networks

SMALL = named_plans(NARROW)["bk_small"]


@pytest.fixture(scope="module")
def counts():
    return {"teacher": count(NARROW), "bk_small": count(student_config(NARROW, SMALL))}


def test_costs_have_their_share_of_the_teachers(counts):
    table = costs_table(counts)
    assert table.loc["teacher", "parameters"] == f"{counts['teacher'].params:,} (100%)"
    share = counts["bk_small"].macs / counts["teacher"].macs
    assert table.loc["bk_small", "MACs (paper's)"].endswith(f"({share:.0%})")
    blocks = blocks_table(counts)
    assert blocks.loc["mid_block", ("bk_small", "params")] == "0" != blocks.loc["mid_block", ("teacher", "params")]


def test_latencies_are_shares_of_the_teachers(counts):
    latency = {"teacher": Latency(2.0, 1.0, 3.0), "bk_small": Latency(1.0, 0.5, 1.5)}
    blocks = {"conv_in": Latency(0.5, 0.5, 0.5), "mid_block": Latency(1.5, 1.5, 1.5)}
    timing = Timing(latency, {"teacher": 4e9, "bk_small": 1e9}, blocks)
    row = timing.table(counts).loc["bk_small"]
    assert (row["latency, of teacher"], row["peak memory, of teacher"], row["quartiles"]) == (
        "50%",
        "25%",
        "0.5 to 1.5",
    )
    assert [row["share of latency"] for row in timing.block_shares(counts["teacher"]).values()] == [0.25, 0.75]


def test_nothing_is_timed_without_repeats(capsys):
    timing = time_networks({"teacher": NARROW}, 0, "cpu")
    assert timing.relative() == {} and "latency_repeats" in capsys.readouterr().out


def test_a_scan_measures_every_unit_and_sorts_by_distance(teacher, monkeypatch):
    probe = {name: torch.zeros(value.shape) if torch.is_tensor(value) else value
             for name, value in unet_inputs(NARROW).items()}  # fmt: skip
    scorer = SimpleNamespace(clip=None, sample=lambda pipeline: [Image.new("RGB", (8, 8))], scores=lambda images: {})
    monkeypatch.setattr(surgery, "with_unet", lambda pipeline, unet: unet)
    same = dict.fromkeys(("teacher", "student"), Latency(1.0, 1.0, 1.0))
    monkeypatch.setattr(surgery, "interleaved_latency", lambda unets, repeats: same)
    units = ("innermost stage", "mid block")  # of 30
    monkeypatch.setattr(
        surgery, "removals", lambda config, plan: {unit: removals(config, plan)[unit] for unit in units}
    )
    scan = RemovalScan(SimpleNamespace(unet=teacher), scorer, [probe, probe])
    singles = scan.single()
    assert next(iter(singles)) == "nothing" and set(singles) == {"nothing", *units}
    distances = [removal.measures["distance"] for removal in singles.values()]
    assert distances == sorted(distances) and distances[0] < 1e-9 < scan.distance(SMALL)
    savings = scan.savings(singles)
    assert "nothing" not in savings and 0 < savings["mid block"]["parameters saved"] < 1
    assert scan.score == "agreement" and "CLIP score lost" not in savings["mid block"]
    assert set(scan.points({"one unit": singles})["one unit"]["nothing"]) == {
        "agreement",
        "parameters",
        "MACs",
        "latency",
    }


def test_the_weight_map_is_counted_by_module():
    names = weight_map(NARROW, SMALL)
    report = copy_report(names, empty_unet(NARROW).state_dict())
    tensors, modules = map_by_module(report, names)
    assert modules["tensors"].sum() == len(tensors) == len(names) + len(report.removed)
    moved = modules[modules["student"] == "up_blocks.0.resnets.1"]
    assert list(moved["teacher"]) == ["up_blocks.0.resnets.2"] and list(moved["what"]) == ["moved"]
