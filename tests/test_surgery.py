import pytest
from conftest import NARROW
from diffusers import UNet2DConditionModel

from bksdm_utils import costs, surgery
from bksdm_utils.presets import SD_V1_UNET
from bksdm_utils.surgery import RemovalPlan, Stage, plan_of

# Parameters, MACs (the paper's convention), MACs with attention: exact, of Stable Diffusion v1 at 512 pixels.
PUBLISHED = {
    "teacher": (859_520_964, 338_749_194_240, 401_636_720_640),
    "bk_base": (579_384_964, 223_755_632_640, 261_496_995_840),
    "bk_small": (482_346_884, 217_727_959_040, 255_447_203_840),
    "bk_tiny": (323_384_964, 205_035_274_240, 242_754_519_040),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sd_v1_costs_are_exact(name):
    config = SD_V1_UNET if name == "teacher" else surgery.student_config(SD_V1_UNET, name)
    counted = costs.count(config)
    assert (counted.params, counted.macs, counted.macs_with_attention) == PUBLISHED[name]


def test_only_the_mid_block_removed():
    plan = surgery.free_plan(SD_V1_UNET, mid=False)
    assert costs.count(surgery.student_config(SD_V1_UNET, plan)).params == 762_482_884


def test_the_plan_that_removes_nothing_gives_the_teacher():
    plan = surgery.identity_plan(NARROW)
    assert costs.count(surgery.student_config(NARROW, plan)) == costs.count(NARROW)


@pytest.mark.parametrize("variant", surgery.VARIANTS)
def test_a_student_is_a_plain_diffusers_model(variant, teacher, tmp_path):
    surgery.build_student(teacher, variant).save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    inputs = costs.unet_inputs(loaded.config, device="cpu")
    assert loaded(*inputs).sample.shape == inputs[0].shape


def test_random_students_follow_their_seed(teacher):
    first, again, other = (
        surgery.build_student(teacher, "bk_tiny", copy=False, seed=seed).conv_in.weight for seed in (3, 3, 4)
    )
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (plan_of("x", stages=5), "keep between 1 and 4"),
        (plan_of("x", stages=2), "would not fit"),
        (plan_of("x", down=(0, 1)), "2 pairs down need 3 up"),
        (plan_of("x", down=(1,)), "pair 0 of down must stay"),
        (plan_of("x", up=(0, 1)), "pairs 0 and 2 of up must stay"),
        (plan_of("x", up=(2, 0)), "rising numbers"),
        (plan_of("x", down=(5,)), "rising numbers among 0 … 1"),
        (RemovalPlan("x", (Stage((), (0,)),) * 4), "pair 0 of down must stay"),
        ("bk_bse", "expected one of bk_base, bk_small, bk_tiny"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(plan, said):
    with pytest.raises(ValueError, match=said):
        surgery.student_config(NARROW, plan)


def test_a_config_that_is_no_unet_is_refused():
    with pytest.raises(ValueError, match="lacks down_block_types"):
        surgery.student_config({"block_out_channels": [1]}, "bk_base")
