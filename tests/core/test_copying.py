import pytest
import torch
from conftest import SD_V1, SD_V2, SDXL

from bksdm_utils.core.copying import copy_report, copy_weights, empty_unet, weight_map
from bksdm_utils.core.plans import SD_VARIANTS, SDXL_VARIANTS, named_plans, student_config
from bksdm_utils.core.surgery import build_student

EXAMPLES = {
    "bk_base": {"up_blocks.1.resnets.1.conv1.weight": "up_blocks.1.resnets.2.conv1.weight",
                "up_blocks.1.attentions.1.norm.weight": "up_blocks.1.attentions.2.norm.weight",
                "down_blocks.0.resnets.0.conv1.weight": "down_blocks.0.resnets.0.conv1.weight"},
    "bk_tiny": {"up_blocks.0.resnets.1.conv1.weight": "up_blocks.1.resnets.2.conv1.weight",
                "up_blocks.1.upsamplers.0.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
                "down_blocks.1.downsamplers.0.conv.weight": "down_blocks.1.downsamplers.0.conv.weight"},
    "koala_700m": {"up_blocks.0.attentions.1.transformer_blocks.4.attn1.to_q.weight":
                   "up_blocks.0.attentions.2.transformer_blocks.4.attn1.to_q.weight"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "variant"),
    [(config, variant) for config in (SD_V1, SD_V2, SDXL) for variant in named_plans(config)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_student_tensor_has_a_source_of_its_shape(config, variant):
    teacher = empty_unet(config).state_dict()
    student = empty_unet(student_config(config, variant)).state_dict()
    names = weight_map(config, variant)
    assert set(names) == set(student)
    assert all(student[name].shape == teacher[source].shape for name, source in names.items())
    assert len(set(names.values())) == len(names)
    report = copy_report(names, teacher)
    assert len(report.kept) + len(report.moved) == len(student) and not report.random
    assert len(report.removed) == len(teacher) - len(student)
    rows = report.rows(names)
    assert len(rows) == len(teacher) and sorted(row[1] for row in rows) == sorted(teacher)


@pytest.mark.parametrize("variant", EXAMPLES)
def test_sources_are_those_of_the_paper(variant):
    names = weight_map(SDXL if variant in SDXL_VARIANTS else SD_V1, variant)
    assert {name: names[name] for name in EXAMPLES[variant]} == EXAMPLES[variant]


@pytest.mark.parametrize("variant", SD_VARIANTS)
def test_copied_weights_are_bit_equal(variant, teacher):
    student = build_student(teacher, variant)
    source = teacher.state_dict()
    for name, origin in weight_map(teacher.config, variant).items():
        assert torch.equal(student.state_dict()[name], source[origin])


def test_a_student_of_another_plan_is_refused_and_left_as_it_was(teacher):
    student = build_student(teacher, "bk_tiny", copy=False)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match="does not follow plan 'bk_base'"):
        copy_weights(teacher, student, "bk_base")
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
