import json

import pytest
import torch
from conftest import NARROW, NARROW_XL, SD_V1, SD_V2, SDXL
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bksdm_utils.config.plan_files import find_plan, read_plan
from bksdm_utils.config.presets import PRESETS
from bksdm_utils.config.shared import Teacher
from bksdm_utils.core.copying import empty_unet, weight_map
from bksdm_utils.core.families import unet_inputs
from bksdm_utils.core.plans import (
    SD_VARIANTS,
    SDXL_VARIANTS,
    VARIANTS,
    RemovalPlan,
    Stage,
    fits,
    free_plan,
    identity_plan,
    named_plans,
    paper_plan,
    removals,
    student_config,
)
from bksdm_utils.core.surgery import build_student, recognise
from bksdm_utils.costs.counting import count
from bksdm_utils.models.configs import model_config, teacher_config


def plan_of(name, down=(0,), up=(0, 2), stages=4, mid=True, depths=None):
    """A plan that keeps the same pairs in every stage."""
    return RemovalPlan(name, tuple(Stage(down, up, depth) for depth in depths or (None,) * stages), mid)


THREE_STAGES = NARROW | {
    "block_out_channels": [8, 16, 16], "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
}  # fmt: skip


def test_variants_of_a_three_stage_teacher_are_valid_and_different():
    plans = named_plans(THREE_STAGES)
    assert list(plans) == list(SD_VARIANTS)
    assert [(len(plan.stages), plan.mid) for plan in plans.values()] == [(3, True), (3, False), (2, False)]
    params = [num_parameters(student_config(THREE_STAGES, plan)) for plan in plans.values()]
    assert params == sorted(params, reverse=True) and len(set(params)) == 3


def test_variants_keep_the_last_pair_of_stages_with_more_layers():
    plan = paper_plan(NARROW | {"layers_per_block": 3}, "x")
    assert plan.stages == (Stage((0,), (0, 3)),) * 4


def test_the_plan_that_removes_nothing_gives_the_teacher():
    plan = identity_plan(NARROW)
    assert count(student_config(NARROW, plan)) == count(NARROW)


@pytest.mark.parametrize("variant", SD_VARIANTS)
def test_a_student_is_a_plain_diffusers_model(variant, teacher, tmp_path):
    build_student(teacher, variant).save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    inputs = unet_inputs(loaded.config, device="cpu")
    assert loaded(**inputs).sample.shape == inputs["sample"].shape


def test_random_students_follow_their_seed(teacher):
    first, again, other = (
        build_student(teacher, "bk_tiny", copy=False, seed=seed).conv_in.weight for seed in (3, 3, 4)
    )
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (plan_of("x", stages=5), "keep between 1 and 4"),
        (plan_of("x", stages=2), "would not fit"),
        (plan_of("x", down=(0, 1)), "2 pairs down need 3 up"),
        (plan_of("x", down=(1,)), "down pair 1 cannot be number 0"),
        (plan_of("x", up=(0, 1)), "up pair 1 cannot be number 1"),
        (plan_of("x", up=(2, 0)), "rising numbers"),
        (plan_of("x", down=(5,)), "rising numbers among 0 … 1"),
        (RemovalPlan("x", (Stage((), (0,)),) * 4), "keeps no pair"),
        (plan_of("x", depths=(None, None, 2, None)), "depth 2 must be 1 … 1"),
        ("bk_bse", "expected one of bk_base, bk_small, bk_tiny"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(plan, said):
    with pytest.raises(ValueError, match=said):
        student_config(NARROW, plan)


def test_a_config_that_is_no_unet_is_refused():
    with pytest.raises(ValueError, match="lacks down_block_types"):
        student_config({"block_out_channels": [1]}, "bk_base")


def test_blocks_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="SimpleCrossAttnDownBlock2D cannot be cut"):
        student_config(NARROW | {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "bk_base")


def test_a_mid_block_that_is_missing_or_would_change_cannot_be_kept():
    headless = NARROW | {"mid_block_type": None}
    with pytest.raises(ValueError, match="the teacher has none"):
        student_config(headless, "bk_base")
    assert student_config(headless, "bk_small")["mid_block_type"] is None
    heads = NARROW | {"attention_head_dim": [1, 2, 4, 8]}
    with pytest.raises(ValueError, match="would compute something else"):
        student_config(heads, plan_of("x", stages=3))


# --- any plan ---------------------------------------------------------------------------------------------------------

STORYBOOK = teacher_config(Teacher())


@st.composite
def plans(draw, config):
    """Any valid plan, built from what may stand where, by rules of its own."""
    widths, total = config["block_out_channels"], len(config["block_out_channels"])
    kept = draw(st.sampled_from([n for n in range(1, total + 1) if n == total or widths[n - 1] == widths[n]]))
    stages = []
    for s in range(kept):
        before, below = widths[max(s - 1, 0)], widths[min(s + 1, total - 1)]
        two = draw(st.booleans())
        down = (0, 1) if two else draw(st.sampled_from([(0,), (1,)] if before == widths[s] else [(0,)]))
        ups = {(0, 2)}
        if before == widths[s]:
            ups.add((0, 1))
        if below == widths[s]:
            ups.add((1, 2))
        stages.append(Stage(down, (0, 1, 2) if two else draw(st.sampled_from(sorted(ups)))))
    return RemovalPlan("any", tuple(stages), mid=draw(st.booleans()))


@st.composite
def broken_plans(draw, config):
    """A teacher's config, a valid plan with one thing made wrong, and a word of the error it must raise."""
    plan = draw(plans(config))
    number = draw(st.integers(0, len(plan.stages) - 1))
    stage = plan.stages[number]
    change, said = draw(st.sampled_from([
        (Stage(stage.down, stage.up[:-1]), "every skip connection needs both"),
        (Stage(stage.down, (*stage.up, 2) if len(stage.up) == 2 else (0, 2)), "need|rising"),
        (Stage((*stage.down, 7), (*stage.up, 8)), "rising numbers"),
        (Stage(stage.down[::-1] if len(stage.down) > 1 else (-1,), stage.up), "rising numbers"),
        (Stage((), stage.up[:1]), "keeps no pair"),
        (Stage(stage.down, stage.up, depth=0), "must be 1"),
        (Stage(stage.down, stage.up, depth=2), "must be 1"),
        (None, "stages, the teacher"),
    ]))  # fmt: skip
    stages = list(plan.stages)
    stages[number : number + 1] = [stage] * 5 if change is None else [change]
    return config, RemovalPlan("broken", tuple(stages), plan.mid), said


SLOWLY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
           "derandomize": True}  # fmt: skip


def holds(plan, config, teacher, folder):
    names = weight_map(config, plan)
    shapes = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
    student = build_student(teacher, plan)
    assert set(names) == set(student.state_dict())
    assert all(tensor.shape == shapes[names[name]] for name, tensor in student.state_dict().items())
    student.save_pretrained(folder)
    loaded = UNet2DConditionModel.from_pretrained(folder).eval()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), loaded.parameters(), strict=True))
    inputs = unet_inputs(config, device="cpu")
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).sample, student.eval()(**inputs).sample, atol=1e-3)  # another layout
    assert read_plan(plan.to_json()) == plan


@pytest.mark.slow
@settings(max_examples=40, **SLOWLY)
@given(plan=plans(NARROW))
def test_any_valid_plan_gives_a_plain_model_with_a_total_map(plan, tmp_path_factory, narrow_teacher):
    holds(plan, NARROW, narrow_teacher, tmp_path_factory.mktemp("student"))


@pytest.mark.slow
@settings(max_examples=40, **SLOWLY)
@given(plan=plans(STORYBOOK))
def test_any_valid_plan_fits_the_storybook(plan, tmp_path_factory, storybook_teacher):
    holds(plan, STORYBOOK, storybook_teacher, tmp_path_factory.mktemp("student"))


@pytest.mark.slow
@settings(max_examples=20, **SLOWLY)
@given(plan=plans(SD_V1))
def test_any_valid_plan_fits_sd_v1_in_full_size(plan):
    names, teacher = weight_map(SD_V1, plan), empty_unet(SD_V1).state_dict()
    student = empty_unet(student_config(SD_V1, plan)).state_dict()
    assert set(names) == set(student)
    assert all(tensor.shape == teacher[names[name]].shape for name, tensor in student.items())


@settings(max_examples=60, **SLOWLY)
@given(broken=st.one_of(broken_plans(STORYBOOK), broken_plans(SD_V1)))
def test_any_invalid_plan_is_refused_with_its_rule(broken, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "from_config", lambda *_: pytest.fail("memory was taken"))
    config, plan, said = broken
    with pytest.raises(ValueError, match=said):
        student_config(config, plan)


@pytest.fixture(scope="module")
def narrow_teacher():
    torch.manual_seed(1)
    return UNet2DConditionModel.from_config(NARROW).eval()


@pytest.fixture(scope="module")
def storybook_teacher():
    return UNet2DConditionModel.from_pretrained(f"{PRESETS['storybook'].configs}/unet").eval()


def num_parameters(config):
    return sum(tensor.numel() for tensor in empty_unet(config).parameters())


@pytest.mark.parametrize("variant", SD_VARIANTS)
def test_named_plans_give_a_plain_model_with_a_total_map(variant, teacher, tmp_path):
    holds(VARIANTS[variant](NARROW), NARROW, teacher, tmp_path)


def test_removals_are_all_valid_one_unit_smaller_and_different():
    whole = identity_plan(SD_V1)
    found = removals(SD_V1, whole)
    smaller = lambda config: num_parameters(config) < num_parameters(SD_V1)  # noqa: E731
    assert {"mid block", "innermost stage", "stage 1: down 1, up 1", "stage 3: down 0, up 0"} <= set(found)
    assert "stage 1: down 0, up 1" not in found  # pair 0 of stage 1 widens
    assert len({plan.stages + (plan.mid,) for plan in found.values()}) == len(found) == 15
    assert all(smaller(student_config(SD_V1, plan)) for plan in found.values())
    assert "stage 2: depth 10 to 9" in removals(SDXL, identity_plan(SDXL))


# --- plans as text ----------------------------------------------------------------------------------------------------


def test_a_description_says_what_stays():
    text = VARIANTS["koala_700m"](SDXL).describe(SDXL)
    assert "stages 0 to 1: keep pair 0 of 2 down, pairs 0, 2 of 3 up" in text
    assert "the first 5 transformer blocks" in text and "mid block: removed" in text
    assert "innermost stages removed: 1" in VARIANTS["bk_tiny"](SD_V1).describe(SD_V1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a removal plan .the text: Invalid JSON"),
        ("[]", "not a removal plan"),
        ('{"name": "x"}', "stages: Field required"),
        ('{"name": "x", "stages": [], "colour": 1}', "colour"),
        ('{"name": 3, "stages": []}', "name: .*string"),
        ('{"name": "x", "stages": [{"down": [0]}]}', "stages.0.up: Field required"),
        ('{"name": "x", "stages": [{"down": ["0"], "up": [0, 2]}]}', "stages.0.down.0: .*integer"),
        ('{"name": "x", "stages": [{"down": [0], "up": [0, 2], "depth": true}]}', "stages.0.depth: .*integer"),
        ('{"name": "x", "stages": [], "mid": "yes"}', "mid: .*boolean"),
    ],
)
def test_a_malformed_plan_says_where(text, said):
    with pytest.raises(ValueError, match=said):
        read_plan(text)


def test_plans_are_found_by_name_alias_and_file(tmp_path):
    assert find_plan("sd_tiny", SD_V1) == VARIANTS["bk_tiny"](SD_V1)
    (tmp_path / "mine.json").write_text(plan_of("mine", mid=False).to_json())
    assert find_plan(str(tmp_path / "mine.json"), SD_V1) == plan_of("mine", mid=False)
    with pytest.raises(ValueError, match="missing: write a plan there"):
        find_plan("nowhere.json", SD_V1)
    with pytest.raises(ValueError, match="sd_small .the same as bk_base."):
        find_plan("sd_huge", SD_V1)


# --- the family -------------------------------------------------------------------------------------------------------

TEACHERS = {"sd-v1.4": SD_V1, "sd-v2.1": SD_V2, "sdxl-base": SDXL}


@pytest.mark.parametrize("name", TEACHERS)
def test_every_named_student_is_recognised(name):
    for variant, plan in named_plans(TEACHERS[name]).items():
        config = student_config(TEACHERS[name], plan) | {"_diffusers_version": "0.1", "sample_size": 7}
        found = recognise(json.loads(json.dumps(config)), TEACHERS)
        assert (found.teacher, found.plan.name, found.differences) == (name, variant, ())


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("bk-sdm-tiny", "bk_tiny of sd-v1.4"), ("bk-sdm-v2-small-768", "bk_small of sd-v2.1")],
)
def test_configs_that_come_with_the_original_are_recognised(folder, expected):
    assert str(recognise(model_config(f"data/configs/students/{folder}"), TEACHERS)) == expected


def test_what_differs_is_named():
    koala = student_config(SDXL, "koala_1b")
    spelt = koala | {"transformer_layers_per_block": [[0], [2], [6]], "attention_head_dim": (5, 10, 20)}
    assert str(recognise(spelt, TEACHERS)) == "koala_1b of sdxl-base"
    assert "cross_attention_dim" in str(recognise(koala | {"cross_attention_dim": 99}, TEACHERS))
    uneven = koala | {"transformer_layers_per_block": [1, [2, 3], [4, 4]]}  # as in SSD-1B
    assert "differ in depth" in str(recognise(uneven, TEACHERS))
    unnamed = recognise(student_config(SD_V1, free_plan(SD_V1, thin=[2])), TEACHERS)
    assert unnamed.differences == () and [len(s.down) for s in unnamed.plan.stages] == [2, 2, 1, 2]
    assert recognise(SD_V1, TEACHERS).plan.name == "teacher"
    with pytest.raises(ValueError, match="not a Stable-Diffusion-shaped"):
        recognise({"architectures": ["Other"]}, TEACHERS)


@pytest.mark.parametrize("variant", SDXL_VARIANTS)
def test_sdxl_students_run_and_round_trip(variant, teacher_xl, tmp_path):
    holds(VARIANTS[variant](NARROW_XL), NARROW_XL, teacher_xl, tmp_path)
    depths = [len(a.transformer_blocks) for a in build_student(teacher_xl, variant).down_blocks[2].attentions]
    assert depths == [{"koala_1b": 6, "koala_700m": 5}.get(variant, 10)]


def test_variants_are_those_of_the_family():
    assert list(named_plans(SD_V2)) == list(SD_VARIANTS)
    assert list(named_plans(SDXL)) == list(SDXL_VARIANTS)


def test_every_preset_has_committed_configs_and_a_variant_that_fits():
    for name, preset in PRESETS.items():
        config, vae = (teacher_config(Teacher(preset=name), part) for part in ("unet", "vae"))
        assert fits(find_plan(preset.common["variant"], config), config)
        assert preset.common["resolution"] == config["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    assert teacher_config(Teacher(preset="sd-v2.1"), "scheduler")["prediction_type"] == "v_prediction"
    assert teacher_config(Teacher(preset="sd-v2.1"))["upcast_attention"] is True


def test_the_config_of_another_teacher_is_its_own(pipeline_dir):
    config = Teacher(preset="sd-v1.4", teacher=str(pipeline_dir))
    assert teacher_config(config)["block_out_channels"] == NARROW["block_out_channels"]
    with pytest.raises((ValueError, OSError), match="text_encoder_2/config.json"):
        teacher_config(config, "text_encoder_2")
