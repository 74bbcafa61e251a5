"""Networks, pipelines and LoRAs as people have them: the right values, or an error that names what is wrong."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from bksdm_utils.evaluation.networks import MetricClip
from bksdm_utils.models.lora import load_lora
from bksdm_utils.models.pipelines import load_pipeline

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def reference(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture
def folder(pipeline_dir, tmp_path):
    """A copy of a narrow pipeline, to be changed."""
    return shutil.copytree(pipeline_dir, tmp_path / "model")


def weights(folder):
    return next(folder.glob("*.safetensors"))


def rewrite(folder, change):
    """Writes the tensors of a network's folder anew, changed in place or given back."""
    file, tensors = weights(folder), load_file(weights(folder))
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def set_json(file, **changes):
    """Changes entries of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def first(tensors):
    return sorted(tensors)[0]


def with_value(value):
    def change(tensors):
        tensors[first(tensors)].view(-1)[0] = value

    return change


def every(function):
    return lambda tensors: {name: function(tensor) for name, tensor in tensors.items()}


def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def wrong_shape(tensors):
    tensors[first(tensors)] = torch.tensor(1.0)


RIGHT = {
    "double precision": every(torch.Tensor.double), "bf16": every(torch.Tensor.bfloat16),
    "fp16": every(torch.Tensor.half),
    "of torch.compile": renamed("_orig_mod."), "of DDP": renamed("module."), "of both": renamed("module._orig_mod."),
}  # fmt: skip
WRONG = {
    "NaN": (with_value(float("nan")), "NaN or infinite values, such as"),
    "infinite": (with_value(float("inf")), "NaN or infinite values, such as"),
    "integers": (every(lambda t: (100 * t).int()), "integers .*quantised"),
    "another shape": (wrong_shape, "other shapes"),
    "other names": (renamed("network."), "lacks .*has unknown network"),
    "a tensor less": (lambda tensors: tensors.pop(first(tensors)) is None, "lacks"),
    "a tensor more": (lambda tensors: tensors.update(more=torch.ones(1)), "unknown more"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", RIGHT)
def test_weights_of_other_precisions_and_wrappers_are_read(part, kind, folder, reference):
    rewrite(folder / part, RIGHT[kind])
    found, expected = getattr(load_pipeline(folder), part).state_dict(), getattr(reference, part).state_dict()
    exact = kind not in ("bf16", "fp16")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) if exact else torch.allclose(found[name], tensor, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", WRONG)
def test_damaged_weights_are_refused_by_name(part, kind, folder):
    change, said = WRONG[kind]
    rewrite(folder / part, change)
    with pytest.raises(ValueError, match=f"could not be loaded .*{said}"):
        load_pipeline(folder)


FILES = {
    "cut short": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:1000]), "cut short"),
    "empty": (lambda f: weights(f).write_bytes(b""), "cut short"),
    "a web page": (lambda f: weights(f).write_text("<html>404</html>"), "cut short"),
    "a pointer of Git LFS": (
        lambda f: weights(f).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "cut short",
    ),
    "no weights": (lambda f: weights(f).unlink(), "no file named"),
    "half a configuration": (lambda f: (f / "config.json").write_text('{"in_ch'), "not a valid JSON|config.json"),
    "a list for a configuration": (lambda f: (f / "config.json").write_text("[1]"), "list|no file named"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_refused_by_name(part, kind, folder):
    change, said = FILES[kind]
    change(folder / part)
    with pytest.raises(ValueError, match=f"(?s)could not be loaded.*({said})"):
        load_pipeline(folder)


@pytest.mark.parametrize("part", PARTS)
def test_pickled_weights_are_read_without_running_them(part, folder, reference):
    file = weights(folder / part)
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    found, expected = getattr(load_pipeline(folder), part).state_dict(), getattr(reference, part).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


CONFIGS = [
    ("unet/config.json", {"block_out_channels": [8, 16, 32, 8]}, "lacks|other shapes"),
    ("unet/config.json", {"norm_num_groups": 7}, "divisible"),
    ("unet/config.json", {"down_block_types": ["Nothing"] * 4}, "Nothing"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "lacks class_embedding"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "lacks time_embedding.cond_proj"),
    ("unet/config.json", {"in_channels": 9}, "other shapes"),
    ("unet/config.json", {"cross_attention_dim": 24}, "other shapes"),
    ("vae/config.json", {"scaling_factor": 0}, "expected a scaling factor"),
    ("vae/config.json", {"scaling_factor": -1.0}, "expected a scaling factor"),
    ("vae/config.json", {"shift_factor": 0.1}, "expected a scaling factor and no shift"),
    (
        "vae/config.json",
        {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4},
        "expected a scaling factor and no shift",
    ),
    ("vae/config.json", {"latent_channels": 16}, "other shapes"),
    ("text_encoder/config.json", {"num_hidden_layers": 1}, "has unknown"),
    ("text_encoder/config.json", {"num_hidden_layers": 9}, "lacks"),
    ("text_encoder/config.json", {"vocab_size": 100}, "other shapes"),
    ("text_encoder/config.json", {"hidden_size": 32}, "other shapes"),
    ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline: expected one of StableDiffusionPipeline"),
    ("model_index.json", {"_class_name": None}, "is a None: expected one of"),
    ("model_index.json", {"unet": None}, "names no unet"),
    ("model_index.json", {"scheduler": None, "vae": None}, "names no vae, scheduler"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "nothing"}, "nothing is not implemented"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "could not be loaded"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts sample: expected a noise schedule"),
]


@pytest.mark.parametrize(("file", "changes", "said"), CONFIGS)
def test_configurations_that_do_not_fit_the_weights_are_refused(file, changes, said, folder):
    set_json(folder / file, **changes)
    with pytest.raises(ValueError, match=said):
        load_pipeline(folder)


def test_an_unknown_entry_of_a_newer_version_does_no_harm(folder, reference):
    set_json(folder / "unet" / "config.json", an_option_of_tomorrow=False)
    assert load_pipeline(folder).unet.num_parameters() == reference.unet.num_parameters()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize("emptied", [False, True])
def test_a_pipeline_that_lacks_a_part_is_refused(part, emptied, folder):
    shutil.rmtree(folder / part)
    if emptied:
        (folder / part).mkdir()
    with pytest.raises(ValueError, match=f"{part}|tokenizer of .* has 2 tokens|could not be loaded"):
        load_pipeline(folder)


def test_another_models_tokenizer_is_refused(folder):
    """One with fewer words would leave embeddings unused; one with more would ask for some that do not exist."""
    vocabulary = len(json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    rows = {"more": vocabulary * 2, "fewer": vocabulary // 2}
    for number in rows.values():
        set_json(folder / "text_encoder" / "config.json", vocab_size=number)
        table = weights(folder / "text_encoder")
        tensors = {
            name: torch.cat([t, t])[:number] if "token_emb" in name else t for name, t in load_file(table).items()
        }
        save_file(tensors, table, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"tokenizer .* has {vocabulary} tokens, its text encoder"):
            load_pipeline(folder)


CLIPS = {
    "NaN": (lambda f: rewrite(f, with_value(float("nan"))), "NaN or infinite"),
    "cut short": (lambda f: weights(f).write_bytes(b"\0" * 10), "cut short"),
    "no image processor": (lambda f: (f / "preprocessor_config.json").unlink(), "image processor"),
    "an image processor of another size": (
        lambda f: set_json(f / "preprocessor_config.json", size={"height": 32, "width": 32},
                           crop_size={"height": 32, "width": 32}), "makes images of 32 pixels, its network takes 64"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "vocab.json", "merges.txt")], "oken"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLIPS)
def test_a_damaged_metric_network_is_refused(kind, tmp_path):
    folder = shutil.copytree("data/storybook/clip", tmp_path / "clip")
    change, said = CLIPS[kind]
    change(folder)
    with pytest.raises(ValueError, match=said):
        MetricClip(folder)


def lora(pipeline, folder, change):
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    pipeline.unet.delete_adapters("default")
    rewrite(folder, change)


LORAS = {
    "NaN": (with_value(float("nan")), "NaN or infinite"),
    "infinite": (with_value(float("inf")), "NaN or infinite"),
    "nothing": (lambda tensors: {"empty": torch.ones(1)}, "could not be loaded"),
    "half of its matrices": (
        lambda tensors: {n: t for n, t in tensors.items() if "lora_A" in n},
        "could not be loaded",
    ),
    "another width": (lambda tensors: {n: torch.cat([t, t], 1) for n, t in tensors.items()}, "could not be loaded"),
    "of no layer": (renamed("nowhere."), "could not be loaded"),
}


@pytest.mark.parametrize("kind", LORAS)
def test_a_damaged_lora_is_refused(kind, pipeline_dir, tmp_path):
    pipeline, (change, said) = load_pipeline(pipeline_dir), LORAS[kind]
    lora(load_pipeline(pipeline_dir), tmp_path, change)
    with pytest.raises(ValueError, match=f"the LoRA .*{said}"):
        load_lora(pipeline, tmp_path)


@pytest.mark.parametrize("kind", ["double precision", "bf16", "fp16"])
def test_a_lora_of_any_precision_is_merged(kind, pipeline_dir, tmp_path):
    pipeline = load_pipeline(pipeline_dir)
    torch.manual_seed(0)
    lora(load_pipeline(pipeline_dir), tmp_path / "plain", lambda tensors: tensors)
    shutil.copytree(tmp_path / "plain", tmp_path / "other")
    rewrite(tmp_path / "other", RIGHT[kind])
    expected, found = (load_lora(pipeline, tmp_path / name).unet.state_dict() for name in ("plain", "other"))
    assert all(torch.allclose(found[name], expected[name], atol=0.02) for name in expected)
