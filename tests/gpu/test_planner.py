"""The memory planner against torch's allocator in training steps of real size."""

import pytest
from gpu.planned import DREAMBOOTH, KD, planned

SLOW = (
    "kd_bk_base_checkpointing", "kd_bk_base_64", "kd_bk_tiny_64", "kd_fp32", "kd_no_ema_one_micro_batch", "kd_sd2",
    "kd_free_plan", "kd_free_plan_xl", "kd_storybook", "dreambooth_full", "dreambooth_full_checkpointing",
    "dreambooth_lora", "dreambooth_lora_student",
)  # fmt: skip


def marked(name):
    mark = pytest.mark.slow if name in SLOW else pytest.mark.nightly
    return name if name == "kd_bk_base" else pytest.param(name, marks=mark)


@pytest.mark.parametrize("name", [marked(name) for name in (*KD, *DREAMBOOTH)])
def test_the_planner_says_what_the_allocator_counts(on_gpu, name, tmp_path):
    counted, foretold = on_gpu(f"memory_{name}"), planned(name, tmp_path)
    assert foretold.allocated == pytest.approx(counted, rel=0.03), foretold
