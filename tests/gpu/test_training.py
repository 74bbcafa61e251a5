"""Distillation on a GPU: values as on the CPU, in every precision, and what a GPU alone can get wrong."""

import numpy as np
import pytest

FP32 = 1e-5  # relative: AdamW is fused on a GPU, and sums in another order
LAST_DIGIT = 2e-7  # of fp32: on most CPUs nothing differs at first, some sum a matrix product in another order
HALF = {"bf16": 1e-2, "fp16": 1e-3}  # of losses; 8 and 11 bits of mantissa


@pytest.mark.parametrize("name", ["kd_fp32", "kd_fp32_checkpointing"])
def test_a_step_in_full_precision_equals_the_cpus(both, name):
    gpu, cpu = both(name)
    assert gpu["loss"][0] == pytest.approx(cpu["loss"][0], rel=LAST_DIGIT)  # before the first optimizer step
    for column in ("loss", "gradient_norm", "student", "ema"):
        assert gpu[column] == pytest.approx(cpu[column], rel=FP32)
    assert gpu["types"] == ["torch.float32"] and not gpu["scaler"] and len(gpu["loss"]) == 2


@pytest.mark.parametrize("name", ["kd_bf16", "kd_fp16", pytest.param("kd_bf16_checkpointing", marks=pytest.mark.slow)])
def test_half_precision_follows_full_precision_with_full_weights(both, name):
    gpu, cpu = both(name)
    kind = name.split("_")[1]
    half = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[kind]
    assert gpu["types"] == sorted([half, "torch.float32"]) and gpu["scaler"] == (kind == "fp16")
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=HALF[kind]) and gpu["loss"] != cpu["loss"]
    assert gpu["skipped"] == [0, 0] and gpu["student"] == pytest.approx(cpu["student"], rel=1e-3)


def test_averaged_weights_may_be_on_the_cpu(both):
    gpu, cpu = both("kd_ema_on_the_cpu")
    assert gpu["loss"][0] == pytest.approx(cpu["loss"][0], rel=LAST_DIGIT) and gpu["student"] == pytest.approx(
        cpu["student"], rel=FP32
    )
    assert gpu["ema"] == pytest.approx(cpu["ema"], rel=1e-5)  # moved at intervals: nearly the single moves


def test_a_step_that_overflows_is_skipped_and_counted_and_the_run_continues(both):
    gpu, cpu = both("kd_overflow")
    assert gpu["skipped"] == cpu["skipped"] == [0, 1, 0]
    assert gpu["sizes"][0] == gpu["sizes"][1] != gpu["sizes"][2]
    assert gpu["scale"] == 65536 / 2 and cpu["scale"] == 1
    assert gpu["loss"][::2] == pytest.approx(cpu["loss"][::2], rel=HALF["fp16"])


def test_a_resumed_run_equals_an_unbroken_one_also_in_its_scale(both):
    gpu, cpu = both("kd_resumed")
    assert gpu["at"] == 1 and gpu["resumed"] == gpu["whole"] and gpu["sizes"][0] == gpu["sizes"][1]
    assert gpu["whole"] == pytest.approx(cpu["whole"], rel=HALF["fp16"])


def test_the_command_trains_in_one_process(both):
    """Fault 2: `torch.cuda.set_device` of a device without an index."""
    gpu, cpu = both("train_command")
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=FP32) and gpu["score"] == pytest.approx(cpu["score"], rel=FP32)
    assert gpu["saved"] == cpu["saved"] and "unet_ema" in gpu["saved"]


@pytest.mark.parametrize(
    ("capability", "bf16"), [("9.0", "bf16"), ("8.0", "bf16"), ("7.5", "fp16")], ids=["9.0", "8.0", "7.5"]
)
def test_bf16_is_taken_where_the_gpu_has_it(on_gpu, capability, bf16):
    """Fault 4: a T4 only emulates bf16, though torch says that it is supported."""
    assert on_gpu(f"precision_{capability}") == {"no": "no", "bf16": bf16, "fp16": "fp16"}


@pytest.mark.parametrize(("doing", "said", "setting"), [
    ("training", "training on micro-batches of 2", "gradient_checkpointing=True"),
    ("sampling", "sampling 8 images at once", "a smaller batch_size or sampling_batch_size"),
    ("scoring", "scoring 8 images or texts at once by clip", "device='cpu'"),
    ("encoding", "encoding the training images", "a lower resolution"),
])  # fmt: skip
def test_too_little_memory_says_what_was_done_and_what_helps(on_gpu, doing, said, setting):
    error = on_gpu(f"{doing}_beyond_the_memory", error=True)
    assert error.startswith(f"RuntimeError: out of GPU memory while {said}: ") and "more were needed, " in error, error
    assert setting in error.split("What helps: ")[1] and ("`bksdm memory`" in error) == (doing == "training")


def test_peak_memory_is_the_networks_own(both):
    """Fault 5: other networks on the GPU were counted too."""
    gpu, cpu = both("peak_memory")
    assert gpu["beside"] == pytest.approx(gpu["alone"], rel=0.1) and gpu["alone"] < gpu["other"]
    assert cpu["alone"] < gpu["alone"] < cpu["alone"] + 40e6  # cuBLAS has a workspace of 32 MB


def test_latents_are_the_same_whatever_the_precision_of_training(both):
    """Fault 6: the cache was keyed and encoded after the cast. Fault 8: the VAE encoded one image at a time."""
    gpu, cpu = both("latents")
    assert gpu["no"] == gpu["bf16"] == gpu["fp16"]
    assert gpu["no"]["key"] == cpu["no"]["key"]
    for moment in ("mean", "std"):
        assert np.allclose(gpu["no"][moment], cpu["no"][moment], rtol=2e-3, atol=1e-4)  # kept in fp16
    assert gpu["encoded"] == cpu["encoded"] == [4]


def test_a_second_precision_in_one_process_works_or_says_what_to_do(on_gpu, on_cpu):
    """Fault 10: `AcceleratorState has already been initialized`."""
    losses, expected = on_gpu("two_precisions"), on_cpu("two_precisions")
    for name, tolerance in {"no": FP32, **HALF}.items():
        assert losses[name] == pytest.approx(expected["no"], rel=tolerance)


def test_averaged_weights_are_swapped_in_only_to_be_scored(both):
    """Fault 11: `validate` swapped them in and out without anything to sample."""
    gpu, cpu = both("validation_of_nothing")
    assert gpu == cpu == {"unscored": 0, "scored": 1}


def test_norms_compute_in_the_precision_of_the_run(on_gpu):
    """Fault 12: autocast computes every norm in fp32; the frozen teacher's are bf16 either way."""
    assert on_gpu("norms") == {"low": ["torch.bfloat16"], "full": ["torch.bfloat16", "torch.float32"]}


@pytest.mark.slow
def test_a_t4_trains_in_fp16(both):
    gpu, cpu = both("kd_bf16_on_a_t4")
    assert gpu["types"] == ["torch.float16", "torch.float32"] and gpu["scaler"]
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=HALF["fp16"])


@pytest.mark.slow
def test_a_process_may_use_the_second_gpu(both):
    gpu, cpu = both("second_gpu")
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=FP32) and gpu["used"] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_dreambooth_equals_the_cpus(both, method):
    gpu, cpu = both(f"dreambooth_{method}")
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=FP32)
    assert np.abs(np.subtract(gpu["image"], cpu["image"])).max() <= 1 and gpu["bytes"] == cpu["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), [("full", "fp16"), ("lora", "bf16")])
def test_dreambooth_in_half_precision_follows_the_cpus(both, method, precision):
    gpu, cpu = both(f"dreambooth_{method}_{precision}")
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=2 * HALF[precision]) and gpu["loss"] != cpu["loss"]
    assert gpu["bytes"] == cpu["bytes"]  # saved in full precision
