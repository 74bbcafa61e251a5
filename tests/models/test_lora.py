import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from bksdm_utils.core.surgery import build_student
from bksdm_utils.models.hashes import architecture_hash, model_hash
from bksdm_utils.models.lora import LORA_BASE, load_lora
from bksdm_utils.models.pipelines import load_pipeline, with_unet


@pytest.fixture
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


def save_lora(pipeline, folder, base=None):
    """A random LoRA of a pipeline's U-Net, with its base in the metadata where one is given."""
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    pipeline.unet.delete_adapters("default")
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, {LORA_BASE: base} if base else None)
    return folder


def test_a_lora_is_merged_into_a_copy(pipeline, pipeline_dir, tmp_path):
    folder = save_lora(load_pipeline(pipeline_dir), tmp_path / "lora", architecture_hash(pipeline.unet))
    before = model_hash(pipeline)
    for path in (folder, folder / "pytorch_lora_weights.safetensors"):
        merged = load_lora(pipeline, path)
        assert model_hash(pipeline) == before != model_hash(merged)
        assert merged.unet.state_dict().keys() == pipeline.unet.state_dict().keys()


def test_a_lora_must_change_the_parts_asked_for(pipeline, pipeline_dir, tmp_path):
    folder = save_lora(load_pipeline(pipeline_dir), tmp_path / "lora")
    with pytest.raises(ValueError, match="nothing for text_encoder, only for unet.*train_text_encoder"):
        load_lora(pipeline, folder, ("unet", "text_encoder"))


@pytest.mark.parametrize("student_first", [True, False])
def test_a_lora_of_another_architecture_is_an_error(pipeline, student_first, tmp_path):
    """Diffusers would load it silently: missing layers are skipped, moved ones get another's adapters."""
    student = with_unet(pipeline, build_student(pipeline.unet, "bk_small"))
    base, other = (student, pipeline) if student_first else (pipeline, student)
    folder = save_lora(base, tmp_path / "lora", architecture_hash(base.unet))
    with pytest.raises(ValueError, match="another architecture"):
        load_lora(other, folder)


def test_a_lora_with_layers_that_do_not_exist_is_an_error(pipeline, tmp_path):
    student = with_unet(pipeline, build_student(pipeline.unet, "bk_small"))
    folder = save_lora(pipeline, tmp_path / "lora")
    with pytest.raises(ValueError, match="another model: .* tensors"):
        load_lora(student, folder)


def test_what_is_no_lora_is_an_error(pipeline, teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "unet")
    save_file({"unet.nowhere.lora_A.weight": torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    for path in (tmp_path / "unet", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"LoRA '{path}' .*(could not be loaded|another model)"):
            load_lora(pipeline, path)
