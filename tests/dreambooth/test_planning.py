"""The memory planner of DreamBooth; tests/gpu/test_planner.py compares it with torch's allocator."""

import pytest

from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.dreambooth.planning import dreambooth_memory, report, tera_operations


def narrow(pipeline_dir, method, **changes):
    own = {"preset": "sd-v1.4", "teacher": str(pipeline_dir), "resolution": 64, "methods": method}
    return DreamBoothTraining.filled(**own | changes).for_method(method)


def allocated(config):
    return dreambooth_memory(config, [4])[4].allocated


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_switch_that_saves_memory_does(pipeline_dir, method):
    plain = allocated(narrow(pipeline_dir, method))
    for change in ({"gradient_checkpointing": True}, {"prior_loss_weight": 0.0}, {"train_text_encoder": False},
                   {"models": "student"}, {"optimizer": "adamw_8bit"}):  # fmt: skip
        assert allocated(narrow(pipeline_dir, method, **change)) < plain, change


def test_adapters_need_less_than_all_weights(pipeline_dir):
    full, lora = (narrow(pipeline_dir, method) for method in ("full", "lora"))
    assert dreambooth_memory(lora, [1])[1].optimizer < dreambooth_memory(full, [1])[1].optimizer / 10
    assert tera_operations(lora) == pytest.approx(tera_operations(full) * 2 / 3)


@pytest.mark.slow
def test_the_report_has_both_methods(pipeline_dir):
    text = report(narrow(pipeline_dir, "full").but(methods=("full", "lora")), tflops=1e-6)
    assert "full with checkpointing" in text and "12 GB: full up to 8" in text and "800 steps of batch 1" in text
    assert "\nlora: " in text and "hours at" in text
