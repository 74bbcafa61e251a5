"""Notebook 03 on a person's own teacher and pictures, as papermill runs it."""

import json

import numpy as np
import papermill
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from bksdm_utils.run import find_notebook


@pytest.fixture
def pictures(tmp_path):
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    rows = ["file_name,text"]
    for i, (size, mode) in enumerate([((600, 300), "RGB"), ((37, 90), "L"), ((64, 64), "P"), ((100, 80), "RGBA")]):
        noise = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(folder / f"{i}.png")
        rows.append(f"{i}.png,picture number {i}")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    (folder / "metadata.csv").write_text("\n".join([*rows, "broken.jpg,cut off", "0.png,"]) + "\n")
    return folder


def run_03(folder, **parameters):
    folder.mkdir()
    notebook = str(find_notebook("03"))
    papermill.execute_notebook(
        notebook,
        str(folder / "03.ipynb"),
        {**parameters, "output_dir": str(folder)},
        progress_bar=False,
        kernel_name="python3",
    )
    return json.loads((folder / "result.json").read_text())


def test_own_teacher_and_pictures_end_in_a_plain_student_twice_the_same(tmp_path, pipeline_dir, pictures):
    parameters = {
        "preset": "sd-v1.4", "variant": "bk_tiny", "teacher": str(pipeline_dir), "train_data_dir": str(pictures),
        "resolution": 64, "batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 3, "num_images": 2,
        "num_inference_steps": 4, "ablation_steps": 1,
    }  # fmt: skip
    first, again = (run_03(tmp_path / name, **parameters) for name in ("a", "b"))
    assert first["metrics"]["loss_last"] == again["metrics"]["loss_last"]
    assert {name for name, _ in first["metrics"]["skipped"]} == {"broken.jpg", "0.png"}
    assert first["metrics"]["num_train_pictures"] == 4
    for kind in ("unet", "unet_ema"):
        one, other = (UNet2DConditionModel.from_pretrained(tmp_path / name / kind) for name in ("a", "b"))
        assert one.config.block_out_channels == [8, 16, 32] and one.config.layers_per_block == 1
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
