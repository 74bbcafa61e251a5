"""Levers of speed: each does to the networks what its parameter says, and nothing where it is off."""

import pytest
import torch
from torch import nn

from bksdm_utils.config.training import KDTraining
from bksdm_utils.core.surgery import build_student
from bksdm_utils.models.devices import GroupNorm, LayerNorm
from bksdm_utils.training import speed
from bksdm_utils.training.speed import COMPILED_FROM, checkpointing_needed, compilation_pays, speed_up

CONFIG = KDTraining.filled()


@pytest.fixture
def networks(teacher):
    return teacher, build_student(teacher, "bk_small")


def convolutions(unet):
    return [module for module in unet.modules() if isinstance(module, nn.Conv2d) and module.weight.shape[2] > 1]


@pytest.mark.parametrize("on", [True, False])
def test_the_layout_of_convolutions_is_as_asked(on, networks):
    for unet in networks:
        unet.to(memory_format=torch.contiguous_format if on else torch.channels_last)
    speed_up(*networks, CONFIG.but(channels_last=on))
    layout = torch.channels_last if on else torch.contiguous_format
    assert all(conv.weight.is_contiguous(memory_format=layout) for unet in networks for conv in convolutions(unet))


@pytest.mark.parametrize(("half", "on", "changed"), [(True, True, True), (True, False, False), (False, True, False)])
def test_norms_are_exchanged_in_half_precision_only(half, on, changed, networks):
    teacher, student = networks
    speed_up(teacher.to(torch.bfloat16) if half else teacher, student, CONFIG.but(low_precision_norms=on))
    norms = [
        module for unet in networks for module in unet.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))
    ]
    assert norms and all(isinstance(norm, (GroupNorm, LayerNorm)) == changed for norm in norms)


@pytest.mark.parametrize("on", [True, False])
def test_checkpointing_is_the_students_alone(on, networks):
    speed_up(*networks, CONFIG.but(gradient_checkpointing=on))
    teacher, student = networks
    assert student.is_gradient_checkpointing == on and not teacher.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("device", "capability", "steps", "asked", "pays"),
    [("cuda", (9, 0), COMPILED_FROM, None, True), ("cuda", (9, 0), COMPILED_FROM - 1, None, False),
     ("cuda", (7, 5), COMPILED_FROM, None, False), ("cpu", (9, 0), COMPILED_FROM, None, False),
     ("cuda", (7, 5), 1, True, True), ("cuda", (9, 0), COMPILED_FROM, False, False)],
)  # fmt: skip
def test_compilation_pays_in_long_runs_on_new_cards(device, capability, steps, asked, pays, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(speed.shutil, "which", lambda name: "/usr/bin/cc")
    config = CONFIG.but(max_train_steps=steps, gradient_accumulation_steps=1, compiled=asked)
    assert compilation_pays(config, device) == pays


def test_without_a_compiler_it_is_refused_if_asked_for_and_said_once_if_not(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    long = CONFIG.but(max_train_steps=COMPILED_FROM)
    assert not compilation_pays(long, "cuda")
    assert capsys.readouterr().out.count("a C compiler") == 1
    with pytest.raises(ValueError, match="needs a C compiler"):
        compilation_pays(long.but(compiled=True), "cuda")


@pytest.mark.parametrize(("free", "on"), [(1e12, False), (1e9, True)])
def test_checkpointing_follows_the_planner_where_nothing_is_asked(free, on, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1e12))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    config = KDTraining.filled(preset="sd-v1.4", batch_size=1)
    assert checkpointing_needed(config, "cuda") == on
    assert ("this does not fit either" in capsys.readouterr().out) == on
