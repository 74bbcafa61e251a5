import json
import os
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import torch

from bksdm_utils.config import shared
from bksdm_utils.core.surgery import build_student
from bksdm_utils.models.hashes import architecture_hash, model_hash, tensors_hash
from bksdm_utils.models.pipelines import SCHEDULERS, for_one_thread, load_pipeline, own_copy, with_scheduler, with_unet
from bksdm_utils.models.saving import load_weights, save_model, save_weights, trained_state


def test_another_unet_leaves_the_first_pipeline_as_it_is(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    student = build_student(pipeline.unet, "bk_tiny")
    changed = with_unet(pipeline, student)
    assert changed.unet is student and pipeline.unet is not student and changed.vae is pipeline.vae
    assert architecture_hash(student) != architecture_hash(pipeline.unet)


def test_changing_a_copy_leaves_the_first_pipeline_as_it_is(pipeline_dir, pipeline_xl_dir):
    for folder in (pipeline_dir, pipeline_xl_dir):
        pipeline = load_pipeline(folder)
        before, own = model_hash(pipeline), own_copy(pipeline)
        assert model_hash(own) == before
        for part in {"unet", "text_encoder", "text_encoder_2"} & set(pipeline.components):
            for parameter in getattr(own, part).parameters():
                parameter.data.zero_()
        assert model_hash(pipeline) == before != model_hash(own) and own.vae is pipeline.vae


def test_a_pipeline_for_one_thread_shares_networks_only(pipeline_xl_dir):
    pipeline = load_pipeline(pipeline_xl_dir)
    other = for_one_thread(pipeline)
    assert other.unet is pipeline.unet and other.text_encoder_2 is pipeline.text_encoder_2
    for part in ("scheduler", "tokenizer", "tokenizer_2"):
        assert getattr(other, part) is not getattr(pipeline, part)


def test_sdxl_is_bfloat16_where_half_precision_is_asked_for(pipeline_dir, pipeline_xl_dir):
    assert load_pipeline(pipeline_dir, dtype=torch.float16).unet.dtype is torch.float16
    assert load_pipeline(pipeline_xl_dir, dtype=torch.float16).unet.dtype is torch.bfloat16


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_keeps_the_teachers_noise_schedule(pipeline_dir, name):
    pipeline = load_pipeline(pipeline_dir)
    changed = with_scheduler(pipeline, name)
    assert type(changed.scheduler).__name__ == SCHEDULERS[name][0] and changed.unet is pipeline.unet
    assert torch.equal(changed.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert with_scheduler(pipeline, None) is pipeline


def test_schedulers_are_those_of_the_parameters():
    assert get_args(shared.SCHEDULERS) == tuple(SCHEDULERS)


@pytest.fixture
def sparse(pipeline_dir, tmp_path):
    """A teacher whose schedule leaves settings to their defaults, as Stable Diffusion's does."""
    folder = shutil.copytree(pipeline_dir, tmp_path / "sparse")
    config = folder / "scheduler" / "scheduler_config.json"
    kept = ("_class_name", "beta_start", "beta_end", "beta_schedule", "skip_prk_steps")
    config.write_text(json.dumps({name: json.loads(config.read_text())[name] for name in kept}))
    return folder


@pytest.mark.slow
def test_a_models_hash_is_the_same_in_every_process(sparse):
    program = "import sys; from bksdm_utils.models.hashes import model_hash\n"
    program += "from bksdm_utils.models.pipelines import load_pipeline; print(model_hash(load_pipeline(sys.argv[1])))"
    command, hashes = [sys.executable, "-c", program, sparse], set()
    for seed in ("0", "1"):
        hashes.add(subprocess.check_output(command, text=True, env={**os.environ, "PYTHONHASHSEED": seed}))
    assert hashes == {model_hash(load_pipeline(sparse)) + "\n"}


@pytest.mark.parametrize(
    "change",
    [lambda p: p.vae.register_to_config(scaling_factor=0.5), lambda p: p.tokenizer.add_tokens(["new"]),
     lambda p: p.scheduler.register_to_config(beta_end=0.5), lambda p: p.unet.conv_in.bias.data.add_(1),
     lambda p: setattr(p.text_encoder.config, "hidden_act", "gelu")],
)  # fmt: skip
def test_a_models_hash_changes_with_every_weight_and_setting(sparse, change):
    pipeline = load_pipeline(sparse)
    before = model_hash(pipeline)
    change(pipeline)
    assert model_hash(pipeline) != before


def test_a_hash_of_tensors_follows_names_types_shapes_and_metadata():
    tensors = {"a": torch.zeros(4)}
    others = [{"b": torch.zeros(4)}, {"a": torch.zeros(4).half()}, {"a": torch.zeros(2, 2)}, {"a": -torch.zeros(4)}]
    hashes = [tensors_hash(tensors), tensors_hash(tensors, "metadata"), *map(tensors_hash, others)]
    assert len(set(hashes)) == 6 and tensors_hash({"a": torch.zeros(4)}) == hashes[0]


def test_a_model_is_saved_completely_or_not_at_all(teacher, tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            folder.mkdir()
            raise OSError("disk full")

    save_model(teacher, tmp_path / "unet")
    with pytest.raises(OSError, match="disk full"):
        save_model(Broken(), tmp_path / "unet")
    with pytest.raises(OSError, match="disk full"):
        save_model(Broken(), tmp_path / "other")
    assert (tmp_path / "unet" / "config.json").exists() and not (tmp_path / "other").exists()


def test_weights_of_a_checkpoint_are_exact_and_only_the_trained_ones(teacher, tmp_path):
    save_weights(teacher, tmp_path / "unet")
    assert all(torch.equal(*pair) for pair in zip(load_weights(tmp_path / "unet").values(),
               dict(sorted(teacher.state_dict().items())).values(), strict=True))  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.BatchNorm1d(2))
    save_weights(model, tmp_path / "part")
    assert load_weights(tmp_path / "part").keys() == trained_state(model).keys()
    assert not any(name.startswith("0.") for name in trained_state(model)) and "1.running_mean" in trained_state(model)
