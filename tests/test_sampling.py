import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from bksdm_utils.core.surgery import build_student
from bksdm_utils.evaluation.sampling import Sampling, image_seed, sample_batches
from bksdm_utils.files import NotAvailable
from bksdm_utils.models.hashes import model_hash
from bksdm_utils.models.pipelines import find_pipeline, load_pipeline, own_copy, with_unet


def test_a_picture_does_not_depend_on_its_batch(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    prompts = ["a big red cat at night", "a small blue star by day", "a big green tree on the sea"]
    sampling, seeds = Sampling(num_inference_steps=4, guidance_scale=4.0), [5, 6, 7]
    (together,) = sample_batches(pipeline, prompts, seeds, sampling)
    for i, picture in enumerate(together):
        ((alone,),) = sample_batches(pipeline, prompts[i : i + 1], seeds[i : i + 1], sampling)
        assert np.array_equal(np.asarray(picture), np.asarray(alone))
    assert image_seed(3, 0) != image_seed(3, 1) != image_seed(4, 1)


def test_threads_do_not_cut_off_each_others_captions(pipeline_dir):
    """Captions longer than the text encoder reads, drawn in several threads: once their tokenizer was shared."""
    pipeline, threads = load_pipeline(pipeline_dir), torch.get_num_threads()
    texts = [f"a big red cat and {i} more things that nobody will ever read to the very end of it" for i in range(64)]
    sampling, seeds = Sampling(num_inference_steps=4, guidance_scale=1.0), list(range(64))
    drawn = []
    for workers in (1, 4):
        torch.set_num_threads(workers)
        drawn.append([np.asarray(p) for some in sample_batches(pipeline, texts, seeds, sampling) for p in some])
    torch.set_num_threads(threads)
    assert np.array_equal(*drawn)


def test_the_unet_is_swapped_and_the_original_kept(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    student = build_student(pipeline.unet, "bk_tiny")
    swapped = with_unet(pipeline, student)
    assert swapped.unet is student and pipeline.unet is not student and swapped.vae is pipeline.vae


def test_a_models_hash_is_the_same_in_every_process_and_another_for_every_change(pipeline_dir, tmp_path):
    """Schedules that leave settings to their defaults, as Stable Diffusion's do, once had a hash for each process."""
    folder = tmp_path / "sparse"
    shutil.copytree(pipeline_dir, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    kept = ("_class_name", "beta_start", "beta_end", "beta_schedule", "skip_prk_steps")
    config.write_text(json.dumps({name: json.loads(config.read_text())[name] for name in kept}))
    program = "import sys; from bksdm_utils.sampling import load_pipeline, model_hash\n"
    program += "print(model_hash(load_pipeline(sys.argv[1])))"
    command, hashes = [sys.executable, "-c", program, folder], set()
    for seed in ("0", "1", "2"):
        hashes.add(subprocess.check_output(command, text=True, env={**os.environ, "PYTHONHASHSEED": seed}))
    pipeline = load_pipeline(folder)
    assert hashes == {model_hash(pipeline) + "\n"}
    changes = [lambda p: p.vae.register_to_config(scaling_factor=0.5), lambda p: p.tokenizer.add_tokens(["new"]),
               lambda p: p.scheduler.register_to_config(beta_end=0.5), lambda p: p.unet.conv_in.bias.data.add_(1),
               lambda p: setattr(p.text_encoder.config, "hidden_act", "gelu")]  # fmt: skip
    for change in changes:
        other = load_pipeline(folder)
        change(other)
        assert model_hash(other) not in {model_hash(pipeline)}


def test_a_copy_is_changed_alone(pipeline_dir, pipeline_xl_dir):
    for place in (pipeline_dir, pipeline_xl_dir):
        pipeline = load_pipeline(place)
        before, own = model_hash(pipeline), own_copy(pipeline)
        assert model_hash(own) == before
        for part in {"unet", "text_encoder", "text_encoder_2"} & set(pipeline.components):
            for parameter in getattr(own, part).parameters():
                parameter.data.zero_()
        assert model_hash(pipeline) == before != model_hash(own) and own.vae is pipeline.vae


def test_only_a_hub_id_counts_as_not_fetched(tmp_path, capsys):
    assert find_pipeline("nobody/no-such-model") is None and "hf download" in capsys.readouterr().out
    for wrong in (tmp_path, tmp_path / "nowhere", "data/storybok/teacher"):
        with pytest.raises(ValueError, match="model_index.json|could not be loaded") as found:
            find_pipeline(wrong)
        assert not isinstance(found.value, NotAvailable)


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
