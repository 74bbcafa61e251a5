"""The published figures, exact, on the meta device; and that what is measured is measured rightly."""

import itertools

import pytest
import torch
from conftest import NARROW
from torch import nn

from bksdm_utils.config.shared import Teacher
from bksdm_utils.core.families import unet_inputs
from bksdm_utils.core.plans import free_plan, student_config
from bksdm_utils.core.surgery import build_student, random_unet
from bksdm_utils.costs.counting import PUBLISHED, beside_published, count, count_pipeline
from bksdm_utils.costs.measuring import LiveBytes, block_latency, interleaved_latency, peak_memory
from bksdm_utils.models.configs import teacher_config

PARAMS = {
    "sd-v1.4": {"teacher": 859_520_964, "bk_base": 579_384_964, "bk_small": 482_346_884, "bk_tiny": 323_384_964,
                "no mid": 762_482_884},
    "sd-v1.5": {"teacher": 859_520_964},
    "sd-v2.1-base": {"teacher": 865_910_724, "bk_base": 583_480_964, "bk_small": 485_787_524, "bk_tiny": 326_825_604},
    "sd-v2.1": {"teacher": 865_910_724, "bk_base": 583_480_964, "bk_small": 485_787_524, "bk_tiny": 326_825_604,
                "no mid": 768_217_284},
    "sdxl-base": {"teacher": 2_567_463_684, "bk_sdxl_base": 1_717_277_764, "bk_sdxl_small": 1_304_160_324,
                  "koala_1b": 1_161_184_324, "koala_700m": 782_822_724},
}  # fmt: skip
MACS = {  # the paper's convention, at each preset's own size of 512 and 768 pixels
    "sd-v1.4": {"teacher": 338_749_194_240, "bk_base": 223_755_632_640, "bk_small": 217_727_959_040,
                "bk_tiny": 205_035_274_240},
    "sd-v2.1": {"teacher": 760_797_839_360, "bk_base": 502_559_293_440, "bk_small": 489_139_896_320,
                "bk_tiny": 460_587_499_520},
}  # fmt: skip
WITH_ATTENTION = {"sd-v1.4": {"teacher": 401_636_720_640, "bk_base": 261_496_995_840, "bk_small": 255_447_203_840,
                              "bk_tiny": 242_754_519_040}}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        pytest.param(p, n, marks=[pytest.mark.slow] if p == "sdxl-base" and n != "koala_700m" else [])
        for p, names in PARAMS.items()
        for n in names
    ],
)
def test_u_nets_cost_exactly_what_is_published(preset, name):
    config = teacher_config(Teacher(preset=preset))
    if name == "no mid":
        config = student_config(config, free_plan(config, mid=False))
    elif name != "teacher":
        config = student_config(config, name)
    counted = count(config)
    assert counted.params == PARAMS[preset][name]
    assert counted.macs == MACS.get(preset, {}).get(name, counted.macs)
    assert counted.macs_with_attention == WITH_ATTENTION.get(preset, {}).get(name, counted.macs_with_attention)
    for field in ("params", "macs", "macs_with_attention"):
        assert sum(getattr(block, field) for block in counted.by_block.values()) == getattr(counted, field)


@pytest.mark.slow
def test_the_rest_of_the_pipeline():
    parts = count_pipeline(Teacher(preset="sd-v1.4"))
    assert parts["text encoder"].params == 123_060_480 and parts["VAE decoder"].params == 49_490_179
    assert parts["U-Net"].macs == 338_749_194_240
    published = {name: whole for name, (_, whole) in PUBLISHED["sd-v1"].items()}
    beside = beside_published({"teacher": sum(parts[p].params for p in parts if p != "VAE encoder")}, published)
    assert beside[0]["published (M)"] == 1040 and -10 < beside[0]["difference (M)"] <= 0  # rounded up to ten million
    xl = count_pipeline(Teacher(preset="sdxl-base"))
    assert xl["text encoder 2"].params == 694_659_840 and xl["VAE decoder"].macs == 4 * parts["VAE decoder"].macs


def test_costs_of_modules_are_those_of_the_layers():
    counted = count(NARROW)
    conv = counted.by_module["down_blocks.0.resnets.0.conv1"]
    assert conv == (8 * 8 * 9 + 8, 8 * 8 * 9 * 64, 8 * 8 * 9 * 64)
    attention = counted.by_module["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    assert attention.macs == 4 * 64 * 8 * 8 and attention.macs_with_attention == attention.macs + 2 * 64 * 64 * 8
    assert count(NARROW, sample_size=16).macs > 2.5 * counted.macs


def test_a_random_unet_is_finite_and_of_its_config():
    unet = random_unet(NARROW)
    with torch.no_grad():
        assert unet(**unet_inputs(NARROW, device="cpu")).sample.isfinite().all()
    assert sum(p.numel() for p in unet.parameters()) == count(NARROW).params


def test_latency_is_measured_in_turns_without_the_first_round(monkeypatch):
    calls, seconds = [], {"quick": 1.0, "slow": 3.0}

    def forward(unet, _inputs):
        calls.append(unet)
        return seconds[unet] + 100 * (len(calls) <= 2)

    monkeypatch.setattr("bksdm_utils.costs.measuring._forward_seconds", forward)
    monkeypatch.setattr("bksdm_utils.costs.measuring._real_inputs", lambda _: {})
    timed = interleaved_latency({name: name for name in seconds}, repeats=3)
    assert calls == ["quick", "slow"] * 4
    assert (timed["quick"].median, timed["slow"].median, timed["slow"].high) == (1.0, 3.0, 3.0)


def test_blocks_are_timed_one_after_another_and_never_one_within_another(teacher, monkeypatch):
    readings = itertools.count()
    monkeypatch.setattr(
        "bksdm_utils.costs.measuring.time.perf_counter", lambda: float(next(readings))
    )  # goes on by 1 each time it is read
    blocks = block_latency(teacher, repeats=2)
    assert {"down_blocks.0", "mid_block", "up_blocks.3", "conv_in"} <= set(blocks)
    assert {(t.low, t.median, t.high) for t in blocks.values()} == {(1.0, 1.0, 1.0)}
    assert next(readings) == 3 * (2 * len(blocks) + 2)  # three passes: each block's start and end, the pass's own
    assert not teacher.mid_block._forward_hooks


def test_peak_memory_counts_what_is_alive_at_once():
    layers = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(6)))
    with torch.no_grad(), LiveBytes() as live:
        layers(torch.zeros(50, 100))
    input_, output = 50 * 100 * 4, 50 * 100 * 4
    assert live.peak == input_ + 2 * output  # one layer's input and output, and the very first input


def test_peak_memory_grows_with_weights_and_batch(teacher):
    weights = sum(p.numel() * 4 for p in teacher.parameters())
    one, eight = peak_memory(teacher), peak_memory(teacher, batch_size=8)
    assert weights < one < eight
    assert peak_memory(build_student(teacher, "bk_tiny")) < one
