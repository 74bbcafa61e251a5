import shutil

import numpy as np
import pytest

from bksdm_utils import surgery
from bksdm_utils.sampling import generate, load_pipeline, picture_seed, with_unet


def test_a_picture_does_not_depend_on_its_batch(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    prompts = ["a big red cat at night", "a small blue star by day", "a big green tree on the sea"]
    options = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 4.0}
    together, alone = (generate(pipeline, prompts, batch_size=size, **options) for size in (3, 1))
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert picture_seed(3, 0) != picture_seed(3, 1) != picture_seed(4, 1)


def test_the_unet_is_swapped_and_the_original_kept(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    student = surgery.build_student(pipeline.unet, "bk_tiny")
    swapped = with_unet(pipeline, student)
    assert swapped.unet is student and pipeline.unet is not student and swapped.vae is pipeline.vae


def test_what_is_no_teacher_is_refused(pipeline_dir, tmp_path):
    with pytest.raises(ValueError, match="no model_index.json"):
        load_pipeline(tmp_path)
    incomplete = tmp_path / "incomplete"
    shutil.copytree(pipeline_dir, incomplete)
    shutil.rmtree(incomplete / "vae")
    with pytest.raises(ValueError, match="vae missing"):
        load_pipeline(incomplete)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_pipeline(tmp_path / "nowhere")
    index = pipeline_dir / "model_index.json"
    other = tmp_path / "other"
    shutil.copytree(pipeline_dir, other)
    (other / "model_index.json").write_text(index.read_text().replace("UNet2DConditionModel", "Transformer2DModel"))
    with pytest.raises(ValueError, match="holds a Transformer2DModel"):
        load_pipeline(other)
