import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
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


def outputs(pipeline):
    with torch.no_grad():
        return pipeline.unet(
            torch.ones(1, 4, 8, 8), 5, torch.ones(1, 4, pipeline.unet.config.cross_attention_dim)
        ).sample


def with_adapter(pipeline, **settings):
    """The output of a pipeline with a random adapter beside its weights, and the PEFT model."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False, **settings)
    model = get_peft_model(pipeline.unet, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    return outputs(pipeline), model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("inside", ["", "unet"])
def test_a_folder_of_peft_is_merged_as_it_was_trained(pipeline, pipeline_dir, tmp_path, settings, inside):
    expected, model = with_adapter(load_pipeline(pipeline_dir), **settings)
    model.save_pretrained(tmp_path / inside)
    merged = load_lora(pipeline, tmp_path)
    assert torch.allclose(outputs(merged), expected, atol=1e-5)
    assert not torch.allclose(outputs(pipeline), expected, atol=1e-3)
    assert merged.unet.state_dict().keys() == pipeline.unet.state_dict().keys()


def test_a_folder_of_peft_for_another_model_is_an_error(pipeline, tmp_path):
    student = with_unet(pipeline, build_student(pipeline.unet, "bk_small"))
    _, model = with_adapter(load_pipeline_copy(pipeline))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LoRA .* another model"):
        load_lora(student, tmp_path)


def load_pipeline_copy(pipeline):
    import copy

    return with_unet(pipeline, copy.deepcopy(pipeline.unet))


def test_attention_processors_without_a_prefix_are_merged(pipeline, pipeline_dir, tmp_path):
    """The names of diffusers before 0.17, of its `save_attn_procs`."""
    folder = save_lora(load_pipeline(pipeline_dir), tmp_path / "lora")
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    expected = outputs(load_lora(pipeline, folder))
    names = {".to_q.lora_A": ".processor.to_q_lora.down", ".to_q.lora_B": ".processor.to_q_lora.up"}
    early = {}
    for name, tensor in tensors.items():
        new = next(old for old in names if old in name)
        early[name.removeprefix("unet.").replace(new, names[new])] = tensor
    save_file(early, tmp_path / "early.safetensors")
    torch.save(early, tmp_path / "pytorch_lora_weights.bin")
    for file in ("early.safetensors", "pytorch_lora_weights.bin"):
        assert torch.allclose(outputs(load_lora(pipeline, tmp_path / file)), expected, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["lora_unet_down_blocks_0_to_q.dora_scale", "unet.x.to_q.lora_magnitude_vector.weight"]
)
def test_a_dora_in_a_file_is_refused_by_name(pipeline, tmp_path, name):
    save_file({name: torch.ones(2), "unet.x.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="it is a DoRA .*PEFT folder"):
        load_lora(pipeline, tmp_path / "dora.safetensors")


def test_a_folder_of_several_loras_asks_for_one(pipeline, tmp_path):
    for name in "ab":
        save_file({"unet.x": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="has 2 weight files: name the file itself"):
        load_lora(pipeline, tmp_path)


def published(pipeline, folder, changes=lambda tensors, configs: None):
    """lora.pt and lora_config.json as BK-SDM's dreambooth_finetune.py writes them (PEFT 0.1's names); W + α/r BA."""
    torch.manual_seed(0)
    tensors, expected = {}, {}
    layers = {"": (pipeline.unet, ("to_q", "to_v")), "text_encoder_": (pipeline.text_encoder, ("q_proj", "v_proj"))}
    for prefix, (network, ends) in layers.items():
        for name, module in network.named_modules():
            if name.endswith(ends):
                a, b = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
                expected[prefix + name] = module.weight.detach() + 4 / 2 * b @ a
                old = name if not prefix or name.startswith("text_model.") else f"text_model.{name}"
                tensors[f"{prefix}model.{old}.lora_A.weight"] = a
                tensors[f"{prefix}model.{old}.lora_B.weight"] = b
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "r": 2, "target_modules": ["to_q"],
              "lora_alpha": 4, "lora_dropout": 0.0, "merge_weights": False, "fan_in_fan_out": False,
              "enable_lora": None, "bias": "none", "modules_to_save": None}  # fmt: skip
    configs = {"peft_config": config, "text_encoder_peft_config": config | {"target_modules": ["q_proj", "v_proj"]}}
    changes(tensors, configs)
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "lora.pt")
    (folder / "lora_config.json").write_text(json.dumps(configs))
    return expected


def test_the_originals_lora_is_merged(pipeline, tmp_path):
    expected = published(pipeline, tmp_path)
    for path in (tmp_path, tmp_path / "lora.pt"):
        merged = load_lora(pipeline, path, ("unet", "text_encoder"))
        for name, weight in expected.items():
            network = merged.text_encoder if name.startswith("text_encoder_") else merged.unet
            found = network.get_submodule(name.removeprefix("text_encoder_")).weight
            assert torch.allclose(found, weight, atol=1e-5), name
    assert merged.unet.state_dict().keys() == pipeline.unet.state_dict().keys()


def with_bias(tensors, _):
    tensors["model.conv_in.bias"] = torch.ones(8)


def without_text(_, configs):
    del configs["text_encoder_peft_config"]


def of_another(tensors, _):
    for name in [name for name in tensors if "mid_block" in name]:
        tensors[name.replace("mid_block", "mid_blocks")] = tensors.pop(name)


def of_another_width(tensors, _):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, 1:]


@pytest.mark.parametrize(
    ("changes", "said"),
    [(with_bias, "conv_in.bias.*bias='none'"), (without_text, "text_encoder_model.*belong to no network"),
     (of_another, "another model"), (of_another_width, "LoRA .*could not be loaded|size mismatch")],
)  # fmt: skip
def test_what_of_the_originals_lora_does_not_fit_is_named(changes, said, pipeline, tmp_path):
    published(pipeline, tmp_path, changes)
    before = model_hash(pipeline)
    with pytest.raises(ValueError, match=said):
        load_lora(pipeline, tmp_path)
    assert model_hash(pipeline) == before


def test_the_originals_lora_needs_its_configuration(pipeline, tmp_path):
    published(pipeline, tmp_path)
    (tmp_path / "lora_config.json").unlink()
    for path in (tmp_path, tmp_path / "lora.pt"):
        with pytest.raises(ValueError, match="lora_config.json"):
            load_lora(pipeline, path)
