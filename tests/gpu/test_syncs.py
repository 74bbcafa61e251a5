"""Waits of the host for the GPU in the hot loops: they leave the GPU idle, so there are limits.

A failure lists the lines that wait; the slow tests cover the other precisions, schedulers and methods.
"""

import pytest

slow = pytest.mark.slow
LCM = pytest.mark.xfail(
    strict=False,
    reason="LCMScheduler.step draws its noise on the CPU: torch_utils.py:108 `torch.cat(latents).to(device)`",
)


def total(waits):
    return sum(waits.values())


def listed(waits):
    return "\n".join(f"{count:5.2f}  {line}" for line, count in waits.items())


@pytest.mark.parametrize(
    ("name", "most"),
    [
        pytest.param("fp32", 1, marks=slow),
        pytest.param("bf16", 1, marks=slow),
        ("fp16", 2),  # GradScaler must know whether to step
        pytest.param("ema_on_the_cpu", 1.5, marks=slow),  # moved after every tenth step, and after the last
    ],
)
def test_distillation_waits_once_a_step_and_never_for_a_micro_batch(on_gpu, name, most):
    found = on_gpu(f"syncs_kd_{name}")
    assert total(found["micro_batch"]) == 0, listed(found["micro_batch"])
    assert total(found["step"]) <= most, listed(found["step"])


@pytest.mark.parametrize(
    "scheduler", ["pndm", *(pytest.param(n, marks=slow) for n in ("dpm++", "euler", "ddim")),
                  pytest.param("lcm", marks=[slow, LCM])]
)  # fmt: skip
def test_sampling_waits_for_no_step(on_gpu, scheduler):
    found = on_gpu(f"syncs_{scheduler}")
    assert total(found["step"]) == 0, listed(found["step"])


@pytest.mark.parametrize("method", [pytest.param("full", marks=slow), "lora"])
def test_dreambooth_waits_once_a_step_and_never_for_a_group(on_gpu, method):
    found = on_gpu(f"syncs_dreambooth_{method}")
    assert total(found["micro_batch"]) == 0, listed(found["micro_batch"])
    assert total(found["step"]) <= 1, listed(found["step"])
