"""Whole pipelines that we save or commit, in another generation of diffusers and transformers."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from bksdm_utils.files import ROOT
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.models.saving import save_model

TEACHER = ROOT / "data" / "storybook" / "teacher"
EARLIER = ("transformers==4.57.*", "diffusers==0.35.*", "huggingface_hub<1", "tokenizers>=0.22,<0.23")
SAMPLE = """
import sys, numpy, torch, transformers
from diffusers import StableDiffusionPipeline
print(transformers.__version__)
for folder in sys.argv[1:]:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    image = pipeline("a big red cat at night", generator=torch.Generator().manual_seed(0), num_inference_steps=4,
                     guidance_scale=2.0, output_type="np").images[0]
    numpy.save(f"{folder}/image.npy", image)
"""


@pytest.fixture
def saved(tmp_path):
    """The committed teacher, and what notebooks 05 and 06 save of it, from half precision too."""
    shutil.copytree(TEACHER, tmp_path / "committed")
    pipeline = load_pipeline(TEACHER)
    save_model(pipeline, tmp_path / "saved")
    save_model(pipeline.to(torch.bfloat16), tmp_path / "half")
    return [str(tmp_path / name) for name in ("committed", "saved", "half")]


def images(saved, path=""):
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, *saved], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip(), [np.load(f"{folder}/image.npy") for folder in saved]


@pytest.mark.slow
def test_what_is_saved_in_half_precision_loads_in_full(saved):
    _, (committed, same, half) = images(saved)
    assert np.abs(committed - same).max() < 1e-5 and np.abs(committed - half).mean() < 0.02


@pytest.mark.nightly
def test_every_pipeline_gives_the_same_image_in_transformers_4(saved, tmp_path):
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(tmp_path / "earlier"), "--no-deps"]
    subprocess.run([*uv, *EARLIER], check=True)
    now, here = images(saved)
    earlier, there = images(saved, str(tmp_path / "earlier"))
    assert now.startswith("5.") and earlier.startswith("4.57")
    assert all(np.abs(one - other).max() <= 1 / 255 for one, other in zip(here, there, strict=True))
