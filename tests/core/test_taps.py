import pytest
import torch
from conftest import SD_V1, SDXL

from bksdm_utils.core.families import unet_inputs
from bksdm_utils.core.plans import SD_VARIANTS, SDXL_VARIANTS, VARIANTS
from bksdm_utils.core.surgery import build_student
from bksdm_utils.core.taps import KD_KINDS, Taps, tap_features, tap_pairs


def test_taps_of_base_and_small_are_the_papers():
    names = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4)]
    for variant in ("bk_base", "bk_small"):
        assert tap_pairs(variant, SD_V1) == [(name, name) for name in names]


def test_taps_of_tiny_are_the_papers():
    assert tap_pairs("bk_tiny", SD_V1) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ]


def test_taps_of_koala_are_self_attentions_of_the_first_blocks():
    pairs = tap_pairs("koala_700m", SDXL, kd="self_attention")
    assert pairs[0] == ("down_blocks.0", "down_blocks.0") and pairs[-1] == ("up_blocks.2", "up_blocks.2")
    inner = [(f"down_blocks.2.attentions.0.transformer_blocks.{k}.attn1",) * 2 for k in range(5)]
    assert pairs[3:8] == inner
    source, target = pairs[8 + 5]  # the second attention of the first up stage was the teacher's third
    assert target == "up_blocks.0.attentions.1.transformer_blocks.0.attn1"
    assert source == "up_blocks.0.attentions.2.transformer_blocks.0.attn1"
    assert len(pairs) == 1 + 2 + 5 + 10 + 4 + 1
    with pytest.raises(ValueError, match="expected one of block, self_attention"):
        tap_pairs("koala_1b", SDXL, kd="attention")


def test_taps_of_distill_sd():
    stages = [(f"down_blocks.{i}",) * 2 for i in range(4)], [(f"up_blocks.{i}",) * 2 for i in range(4)]
    assert tap_pairs("bk_base", SD_V1, "segmind") == [*stages[0], ("mid_block", "mid_block"), *stages[1]]
    assert tap_pairs("bk_small", SD_V1, "segmind") == [*stages[0], *stages[1]]
    up = [(f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in range(3)]
    assert tap_pairs("bk_tiny", SD_V1, "segmind") == [*stages[0][:2], ("up_blocks.0", "down_blocks.2"), *up]


@pytest.mark.parametrize("kd", KD_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tapped_modules_exist_and_agree_in_shape(variant, kd, teacher, teacher_xl):
    network = teacher_xl if variant in SDXL_VARIANTS else teacher
    student, pairs = build_student(network, variant), tap_pairs(variant, network.config, kd)
    inputs = unet_inputs(network.config, device="cpu")
    of_teacher = tap_features(network, [t for t, _ in pairs], **inputs)
    of_student = tap_features(student, [s for _, s in pairs], **inputs)
    assert [f.shape for f in of_teacher] == [f.shape for f in of_student]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", SD_VARIANTS)
def test_gradient_reaches_every_tap(variant, checkpointing, teacher):
    student = build_student(teacher, variant).train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    noise = torch.randn(2, 4, 8, 8)
    inputs = (noise, torch.tensor([10, 500]), torch.randn(2, 20, 16))
    names = [s for _, s in tap_pairs(variant, teacher.config)]
    for name in names:
        student.zero_grad()
        taps = Taps(student, [name])
        taps.listen()
        student(*inputs)
        (activation,) = taps.take()
        activation.square().mean().backward()
        own = [p for n, p in student.named_parameters() if n.startswith(name)]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own), name
        taps.close()


def test_activations_are_released_when_taken(teacher):
    taps, inputs = Taps(teacher, ["down_blocks.0"]), unet_inputs(teacher.config, device="cpu")
    teacher(**inputs)
    assert taps._outputs is None
    taps.listen()
    teacher(**inputs)
    assert len(taps.take()) == 1 and taps._outputs is None
    taps.close()
    taps.listen()
    teacher(**inputs)
    assert taps._outputs == {}


def test_tap_features_leave_no_hooks(teacher):
    inputs = unet_inputs(teacher.config, device="cpu")
    features = tap_features(teacher, ["mid_block"], **inputs)
    assert features[0].shape == (1, 32, 1, 1)
    assert not teacher.mid_block._forward_hooks
