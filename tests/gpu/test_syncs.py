"""Waits of the host for the GPU in the hot loops: they keep the GPU idle, so there are limits."""

import pytest


def total(waits):
    return sum(waits.values())


def listed(waits):
    return "\n".join(f"{count:5.2f}  {line}" for line, count in waits.items())


@pytest.mark.parametrize(("name", "most"), [("fp32", 1), ("bf16", 1), ("fp16", 2), ("ema_on_the_cpu", 1.1)])
def test_distillation_waits_once_a_step_and_never_for_a_micro_batch(on_gpu, name, most):
    """With GradScaler twice: it must know whether to step. EMA on the CPU is moved every ten steps."""
    found = on_gpu(f"syncs_kd_{name}")
    assert total(found["micro_batch"]) == 0, listed(found["micro_batch"])
    assert total(found["step"]) <= most, listed(found["step"])


@pytest.mark.parametrize("scheduler", ["pndm", "dpm++", "euler", "ddim", "lcm"])
def test_sampling_waits_for_no_step(on_gpu, scheduler):
    found = on_gpu(f"syncs_{scheduler}")
    assert total(found["step"]) == 0, listed(found["step"])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dreambooth_waits_once_a_step_and_never_for_a_group(on_gpu, method):
    found = on_gpu(f"syncs_dreambooth_{method}")
    assert total(found["micro_batch"]) == 0, listed(found["micro_batch"])
    assert total(found["step"]) <= 1, listed(found["step"])
