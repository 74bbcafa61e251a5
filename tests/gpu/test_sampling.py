"""Sampling, scores and exports on a GPU: values as on the CPU."""

import numpy as np
import pytest


def close(images, others, most=1, mean=0.01):
    """Whether pixels differ by roundings only."""
    difference = np.abs(np.subtract(images, others))
    return difference.max() <= most and difference.mean() <= mean


def test_one_image_is_one_pass_of_one_image(both):
    """Fault 7: passes were filled up to the batch size on a GPU too; with guidance the U-Net takes two."""
    gpu, _ = both("one_image")
    assert gpu == {"images": 1, "unet": [2]}


def test_large_batches_are_decoded_in_parts(on_gpu):
    """Fault 8, its other half: decoding stays limited, and encoding after it is not."""
    found = on_gpu("decoding")
    assert found["images"] == 24 and max(found["sizes"]) <= 16 and not found["slicing"]


def test_the_command_samples_in_one_process(both):
    """Fault 2, in sampling; its pipeline is in half precision."""
    gpu, cpu = both("sample_command")
    assert len(gpu) == len(cpu) == 3 and close(gpu, cpu, most=20, mean=2)


def test_scores_take_what_is_on_the_gpu(both):
    """Fault 1: numpy's `asarray` of a CUDA tensor; it ended notebook 03 at its first step."""
    gpu, cpu = both("scores")
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.slow
def test_a_validation_of_a_training_gives_the_cpus_scores(both):
    """Fault 1, as notebook 03 met it."""
    gpu, cpu = both("validation")
    assert set(gpu) == {"clip_score", "fid"} and gpu == pytest.approx(cpu, rel=1e-2)


@pytest.mark.parametrize("name", ["halves_saved", "bf16_saved"])
def test_a_pipeline_in_half_precision_is_saved_in_full(both, name):
    """Fault 3: transformers loads what it finds, diffusers fp32; the two did not work together."""
    gpu, cpu = both(name)
    assert set(gpu["dtypes"].values()) == set(gpu["saved"]) == {"torch.float32"} and gpu["image"] == cpu["image"]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["pndm", "dpm++", "euler", "ddim", "lcm"])
def test_every_scheduler_samples_the_cpus_images(both, scheduler):
    gpu, cpu = both(f"sample_{scheduler}")
    assert close(gpu, cpu) and len(gpu) == 2


@pytest.mark.slow
def test_a_few_step_student_equals_the_cpus(both):
    gpu, cpu = both("lcm")
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-5) and gpu["scheduler"] == "LCMScheduler"
    assert close(gpu["image"], cpu["image"], most=30, mean=3)  # sampled in half precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusers", "single_file"])
def test_an_export_of_a_pipeline_on_the_gpu_is_the_cpus(both, kind):
    gpu, cpu = both(f"export_{kind}")
    assert gpu == cpu and gpu["megabytes"]
