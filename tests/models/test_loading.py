import json
import shutil

import pytest
from transformers import CLIPModel

from bksdm_utils.config.presets import PRESETS
from bksdm_utils.config.shared import Teacher
from bksdm_utils.files import NotAvailable
from bksdm_utils.models.configs import model_config, teacher_config
from bksdm_utils.models.loading import load, named_errors
from bksdm_utils.models.pipelines import find_pipeline, load_pipeline, load_unet


@pytest.fixture
def copied(pipeline_dir, tmp_path):
    return shutil.copytree(pipeline_dir, tmp_path / "teacher")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_only_a_hub_id_counts_as_not_available(tmp_path, capsys):
    assert find_pipeline("nobody/no-such-model") is None
    assert "hf download nobody/no-such-model" in capsys.readouterr().out
    for wrong in (tmp_path, tmp_path / "nowhere", "data/storybok/teacher"):
        with pytest.raises(ValueError, match=f"{wrong}.* could not be loaded") as error:
            find_pipeline(wrong)
        assert not isinstance(error.value, NotAvailable)


def test_any_class_is_loaded_with_the_same_errors(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"CLIPModel '{tmp_path}' could not be loaded.*expected") as error:
        load(CLIPModel, tmp_path)
    assert not isinstance(error.value, NotAvailable)
    with pytest.raises(NotAvailable, match="CLIPModel 'nobody/clip' .*hf download nobody/clip"):
        load(CLIPModel, "nobody/clip", local_files_only=True)
    message = "the thing 'x' could not be loaded .KeyError: 'y'.: expected z"
    with pytest.raises(ValueError, match=message), named_errors("the thing", "x", "z"):
        raise KeyError("y")


@pytest.mark.parametrize("part", ["vae", "tokenizer", "text_encoder", "scheduler", "unet"])
def test_a_missing_part_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(ValueError, match=f"{part} missing"):
        load_pipeline(copied)


def test_another_kind_of_pipeline_or_unet_is_an_error(copied):
    edit(copied / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    with pytest.raises(ValueError, match="is a StableDiffusionImg2ImgPipeline: expected one of StableDiff"):
        load_pipeline(copied)
    edit(copied / "model_index.json", unet=["diffusers", "Transformer2DModel"])
    with pytest.raises(ValueError, match="Transformer2DModel, not a UNet2DConditionModel"):
        load_pipeline(copied)
    (copied / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="could not be loaded.*JSON"):
        load_pipeline(copied)


def test_a_unet_is_loaded_from_its_folder_or_a_pipelines(pipeline_dir, teacher, tmp_path):
    pipeline = load_pipeline(pipeline_dir)
    teacher.save_pretrained(tmp_path / "unet")
    for path in (tmp_path / "unet", pipeline_dir):
        assert load_unet(path, pipeline).state_dict().keys() == teacher.state_dict().keys()
    type(teacher).from_config(dict(teacher.config) | {"cross_attention_dim": 24}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="cross_attention_dim 24, the pipeline's has 16.*another teacher"):
        load_unet(tmp_path / "other", pipeline)
    with pytest.raises(ValueError, match="UNet2DConditionModel .*nowhere' could not be loaded"):
        load_unet(tmp_path / "nowhere", pipeline)


def test_every_preset_has_committed_configs():
    for preset in PRESETS:
        config = Teacher.filled(preset=preset)
        factor = 2 ** (len(teacher_config(config, "vae")["block_out_channels"]) - 1)
        assert config.chosen_preset.common["resolution"] == teacher_config(config)["sample_size"] * factor
        assert "beta_start" in teacher_config(config, "scheduler")
    assert teacher_config(Teacher(preset="sd-v2.1"), "scheduler")["prediction_type"] == "v_prediction"
    assert teacher_config(Teacher(preset="sd-v2.1"))["upcast_attention"] is True


def test_another_teachers_config_is_its_own(pipeline_dir):
    config = Teacher(preset="sd-v1.4", teacher=str(pipeline_dir))
    assert teacher_config(config)["block_out_channels"] == [8, 16, 32, 32]
    assert model_config(pipeline_dir / "unet") == teacher_config(config)
    with pytest.raises(ValueError, match="text_encoder_2 config .*expected text_encoder_2/config.json"):
        teacher_config(config, "text_encoder_2")
    with pytest.raises(NotAvailable, match="nobody/no-such-model"):
        model_config("nobody/no-such-model")
