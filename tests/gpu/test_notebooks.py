"""Notebooks 00 to 06, whole, on the stub GPU: their metrics are those of the same parameters on the CPU.

A notebook's kernel is a child process; startup/sitecustomize.py installs the stub in it.
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from gpu import stub
from PIL import Image

from bksdm_utils.core.surgery import build_student
from bksdm_utils.files import ROOT
from bksdm_utils.models.pipelines import load_pipeline

pytestmark = pytest.mark.nightly

MEASURED = (
    "second",
    "latency",
    "memory",
    "GB",
    "figure",
    "started",
    "images/s",
    "images a s",
)  # differ between devices
SAMPLED = {"num_images": 2, "num_inference_steps": 4}
OWN = {"preset": "sd-v1.4", "variant": "bk_small"}  # the teacher is a narrow one
TRAINED = {"train_data_dir": "images", "resolution": 64, "batch_size": 2}
CLIP = {"clip": str(ROOT / "data" / "storybook" / "clip")}
# Parameters, files that the run must leave, and the relative tolerance of its metrics: fp16 sampling and few steps of
# training in fp32. FID and the like of two images magnify roundings, so scores are compared more loosely.
NOTEBOOKS = {
    "00": ({"num_images": 3, "num_inference_steps": 4}, [], 0.1),
    "01": ({**OWN, **SAMPLED, "greedy_steps": 1, "latency_repeats": 2}, ["greedy_1.json"], 0.05),
    "02": ({**OWN, **SAMPLED}, ["weight_map.csv"], 0.05),
    "03": ({**OWN, **TRAINED, **SAMPLED, "gradient_accumulation_steps": 1, "max_train_steps": 2, "ablation_steps": 1,
            "mixed_precision": "no"}, ["unet/config.json", "unet_ema/config.json", "log.csv"], 0.05),
    "04": ({**OWN, "students": "student", "prompts": "captions.csv", "real": "images", "protocol": "storybook",
            "num_inference_steps": 4, "scheduler": "euler", "num_guidance_images": 20, "guidances": "2",
            "images_dir": "sampled"}, ["scores.csv"], 0.2),
    "05": ({**OWN, **CLIP, "subject": "images", "class_word": "fish", "identifier": "x", "num_class_images": 2,
            "student": "student", "max_train_steps": 2, "num_images": 1, "num_inference_steps": 4, "drift_steps": 0,
            "models": "student", "lora_targets": "to_q,to_v", "images_dir": "sampled", "mixed_precision": "no"},
           [], 0.2),
    "06": ({**OWN, **TRAINED, **CLIP, "student": "student", "num_inference_steps": 4, "lcm_steps": 2, "num_images": 2,
            "few_steps": "1,2", "formats": "diffusers,single_file"},
           ["exports/diffusers/README.md", "few_step/model_index.json"], 0.2),
}  # fmt: skip


@pytest.fixture
def given(tmp_path, teacher_dir):
    """What the parameters name: images with captions, a student, captions; the folder that they lie in."""
    (tmp_path / "images").mkdir()
    rng, rows = np.random.default_rng(0), ["file_name,text"]
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
        rows.append(f"{i}.png,picture number {i}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "captions.csv").write_text("\n".join(["id,text", *(f"{i},picture number {i}" for i in range(22))]))
    build_student(load_pipeline(teacher_dir).unet, "bk_small").save_pretrained(tmp_path / "student")
    return tmp_path


def run(number, device, folder, parameters):
    """Runs a notebook by the command; its result."""
    names = {"students", "student", "prompts", "real", "images_dir", "train_data_dir"}
    names |= {"subject"} if number == "05" else set()
    own = {name: str(folder / value) for name, value in parameters.items() if name in names}
    output = folder / device
    pairs = parameters | own | {"device": device, "output_dir": str(output)}
    if "images_dir" in pairs:
        pairs["images_dir"] = str(folder / f"images of {device}")
    options = [part for name, value in pairs.items() for part in ("-p", name, str(value))]
    environment = stub.environment() if device == "cuda" else {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bksdm_utils", "run", number, *options]
    environment["HF_HUB_CACHE"] = str(folder / "no downloads")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((output / "result.json").read_text()), output


def numbers(metrics, path=""):
    """The numbers of nested metrics by their path, without what depends on the machine."""
    if isinstance(metrics, dict):
        parts = [numbers(value, f"{path}/{name}") for name, value in metrics.items()]
    elif isinstance(metrics, list):
        parts = [numbers(value, f"{path}/{i}") for i, value in enumerate(metrics)]
    else:
        known = isinstance(metrics, (int, float)) and not any(word in path for word in MEASURED)
        return {path: metrics} if known else {}
    return {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_a_notebook_ends_on_a_gpu_with_the_cpus_metrics(number, given, teacher_dir):
    """Every number in result.json's metrics is there on both devices, finite on both or neither, and close."""
    parameters, files, tolerance = NOTEBOOKS[number]
    if "preset" in parameters:
        parameters = parameters | {"teacher": str(teacher_dir)}
    (gpu, output), (cpu, _) = (run(number, device, given, parameters) for device in ("cuda", "cpu"))
    assert "stub GPU" in gpu["provenance"]["device"] and "stub GPU" not in cpu["provenance"]["device"]
    assert all((output / name).is_file() for name in files)
    one, other = numbers(gpu["metrics"]), numbers(cpu["metrics"])
    assert set(one) == set(other) and one
    different = {
        name: (value, other[name])
        for name, value in one.items()
        if math.isfinite(value) != math.isfinite(other[name])
        or (math.isfinite(value) and not math.isclose(value, other[name], rel_tol=tolerance, abs_tol=tolerance))
    }
    assert not different
