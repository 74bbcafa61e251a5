"""The memory planner and its advice; tests/gpu/test_planner.py compares it with torch's allocator."""

import pytest
from click.testing import CliRunner

from bksdm_utils.config.training import KDTraining
from bksdm_utils.costs.planner import distillation_memory, memory_by_micro_batch, report
from bksdm_utils.workbook.cli import main

ALLOCATED = [  # preset, variant, micro-batch, checkpointing, GB: bf16, norms in fp32, average on the GPU
    ("sd-v1.4", "bk_base", 8, False, 21.9),
    ("sd-v1.4", "bk_base", 8, True, 16.7),
    ("sd-v1.4", "bk_tiny", 1, False, 10.2),
]


@pytest.mark.parametrize(("preset", "variant", "size", "checkpointing", "gb"), ALLOCATED)
def test_the_plan_is_what_the_allocator_counted(preset, variant, size, checkpointing, gb):
    config = KDTraining.filled(preset=preset, variant=variant, batch_size=size, low_precision_norms=False,
                               gradient_checkpointing=checkpointing)  # fmt: skip
    assert distillation_memory(config).allocated / 1e9 == pytest.approx(gb, rel=0.05)  # features were kept in fp32 then


def narrow(pipeline_dir, **changes):
    own = {"preset": "sd-v1.4", "teacher": str(pipeline_dir), "resolution": 64, "batch_size": 8}
    return KDTraining.filled(**own | changes)


def test_micro_batches_in_between_are_interpolated(pipeline_dir):
    config = narrow(pipeline_dir, ema_decay=0.0)
    by_size = memory_by_micro_batch(config, [2, 4, 8, 16])
    assert by_size[8].activations == pytest.approx(distillation_memory(config).activations, rel=0.01)


def test_every_switch_that_saves_memory_does(pipeline_dir):
    plain = distillation_memory(narrow(pipeline_dir)).allocated
    for change in ({"gradient_checkpointing": True}, {"ema_decay": 0.0}, {"ema_device": "cpu"},
                   {"optimizer": "adamw_8bit"}, {"batch_size": 4}):  # fmt: skip
        assert distillation_memory(narrow(pipeline_dir, **change)).allocated < plain, change
    assert distillation_memory(narrow(pipeline_dir, mixed_precision="no")).allocated > plain


def test_the_report_says_what_fits_and_how_long_it_takes(pipeline_dir):
    text = report(narrow(pipeline_dir, max_train_steps=1000), tflops=0.001)
    assert "12 GB: plain up to 32, checkpointing up to 32" in text and "1,000 steps of batch 32" in text
    assert text.splitlines()[-1].split()[0] != "0" and "minutes at 0 TFLOP/s" in text


@pytest.mark.parametrize("notebook", ["03", pytest.param("05", marks=pytest.mark.slow)])
def test_the_command_needs_no_weights(pipeline_dir, notebook):
    done = CliRunner().invoke(main, ["memory", notebook, "-p", "preset", "sd-v1.4", "-p", "teacher", str(pipeline_dir),
                                     "-p", "resolution", "64", "-p", "batch_size", "2"])  # fmt: skip
    assert done.exit_code == 0 and "80 GB" in done.output, done.output


def test_the_command_refuses_what_cannot_be_planned():
    wrong = CliRunner().invoke(main, ["memory", "-p", "variant", "bk_huge"])
    assert wrong.exit_code == 1 and "bk_huge" in wrong.output
    xl = CliRunner().invoke(main, ["memory", "05", "-p", "preset", "sdxl-base"])
    assert xl.exit_code == 1 and "DreamBooth is not written for SDXL" in xl.output
