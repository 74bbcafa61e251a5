"""After training a run's folder holds a whole pipeline for plain diffusers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from distilling import prepared
from PIL import Image

from bksdm_utils.models.pipelines import load_pipeline, save_student_pipeline, with_unet

PLAIN = """
import sys
import torch
from diffusers import StableDiffusionPipeline
assert "bksdm_utils" not in sys.modules
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(3)).images[0].save(sys.argv[2])
"""


def same(image, other):
    """But for the rounding of another memory layout."""
    return np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


def image_of(pipeline):
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipeline("a cat", num_inference_steps=4, generator=generator).images[0])


def test_a_fresh_process_samples_what_the_run_showed(narrow, tmp_path):
    job = prepared(tmp_path / "run", **{**narrow, "max_train_steps": 2, "checkpoint_steps": 0})
    for _ in job.progress():
        pass
    folder = job.save()
    with job.trainer.ema_weights() as averaged:
        shown = image_of(with_unet(job.pipe, averaged))
    command = [sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "image.png")]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert same(Image.open(tmp_path / "image.png"), shown)
    linked = {path.name: path.resolve() for path in folder.iterdir() if path.is_symlink()}
    assert linked["unet"] == (tmp_path / "run" / "unet_ema").resolve() and {"vae", "text_encoder"} <= set(linked)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert (
        StableDiffusionPipeline.from_pretrained(moved / "pipeline").unet.num_parameters()
        == job.student.num_parameters()
    )


@pytest.mark.parametrize("kind", ["no links", "half precision", "variant"])
def test_what_cannot_be_linked_is_saved(kind, narrow, tmp_path, monkeypatch):
    teacher = load_pipeline(narrow["teacher"])
    teacher.unet.save_pretrained(tmp_path / "unet")
    folder = tmp_path / "teacher"
    if kind == "no links":
        monkeypatch.setattr("os.symlink", lambda *_, **__: (_ for _ in ()).throw(OSError("no links here")))
        teacher.save_pretrained(folder)
    else:
        teacher.to(torch.float16).save_pretrained(folder, variant="fp16" if kind == "variant" else None)
        teacher = load_pipeline(folder)
        teacher.unet = load_pipeline(narrow["teacher"]).unet
    shown = image_of(teacher)
    save_student_pipeline(teacher, folder, tmp_path / "unet", tmp_path / "pipeline")
    assert not any(path.is_symlink() for path in (tmp_path / "pipeline").iterdir())
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert plain.text_encoder.dtype is torch.float32 and same(image_of(plain), shown)
