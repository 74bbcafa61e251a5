import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import kill_at, stop_at
from PIL import Image

from bksdm_utils.config.evaluation import FolderSampling, SampleFolder
from bksdm_utils.core.surgery import build_student
from bksdm_utils.evaluation import folders
from bksdm_utils.evaluation.folders import (
    complete_images,
    delete_images,
    folder_of,
    image_path,
    sample,
    sample_folder,
    sample_in_processes,
)
from bksdm_utils.evaluation.prompts import Prompt, storybook_prompts
from bksdm_utils.models.pipelines import load_pipeline, with_scheduler, with_unet

FAST = FolderSampling(num_inference_steps=4, guidance_scale=2.0)


def run(pipeline, prompts, folder, sampling=FAST):
    return list(sample_folder(pipeline, prompts, folder, sampling))


def bits(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir() if path.suffix != ".part"}


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture(scope="module")
def unbroken(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(pipeline, storybook_prompts(96), folder)
    return bits(folder)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("step", [1, 2, 7, 17])
def test_an_interrupted_folder_is_completed_with_the_same_images(pipeline, unbroken, tmp_path, monkeypatch, step):
    def stop():
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at(step, stop))
        with pytest.raises(Stopped):
            run(pipeline, storybook_prompts(12), tmp_path)
    assert len(bits(tmp_path)) < 12
    run(pipeline, storybook_prompts(12), tmp_path)
    assert len(complete_images(tmp_path, storybook_prompts(12))) == 12 and bits(tmp_path).items() <= unbroken.items()


@pytest.mark.slow
def test_twenty_kills_change_no_image(pipeline_dir, unbroken, tmp_path):
    config = SampleFolder(teacher=str(pipeline_dir), num_images=96, device="cpu", **FAST.values())
    context, rng = multiprocessing.get_context("forkserver"), random.Random(1)
    context.set_forkserver_preload(["bksdm_utils.evaluation.folders"])
    for _ in range(20):
        process = context.Process(target=kill_at, args=(rng.randrange(24), config, tmp_path))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 0 < len(complete_images(tmp_path, storybook_prompts(96))) < 96
    sample(config, tmp_path)
    assert bits(tmp_path) == unbroken


@pytest.mark.slow
def test_two_processes_share_what_is_missing(pipeline, pipeline_dir, unbroken, tmp_path):
    prompts = storybook_prompts(48)
    config = SampleFolder(teacher=str(pipeline_dir), num_images=48, device="cpu", **FAST.values())
    run(pipeline, prompts, tmp_path)
    missing = prompts[::2]  # all of one process's share, if all prompts were shared
    for prompt in missing:
        image_path(tmp_path, prompt.id).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    steps = list(sample_in_processes(config, prompts, tmp_path, 2))
    assert steps and all(24 <= step.done <= 48 == step.total for step in steps)
    assert len(bits(tmp_path)) == 48 and bits(tmp_path).items() <= unbroken.items()
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_a_run_waits_for_another_that_fills_the_folder(pipeline, tmp_path, capsys):
    script = "import sys, time; from pathlib import Path; from bksdm_utils.files import folder_lock\n"
    script += "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(1)"
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    assert run(pipeline, storybook_prompts(1), tmp_path)[-1].done == 1 and other.wait() == 0
    assert capsys.readouterr().out.count(f"another run writes to {tmp_path}: waiting for it") == 1


def test_settings_and_texts_are_recorded(pipeline, tmp_path):
    prompts = storybook_prompts(5)
    steps = run(pipeline, prompts, tmp_path)
    assert [p.done for p in steps] == [0, 5] and steps[-1].total == 5
    assert [prompt for prompt, _ in steps[-1].newest] == prompts
    settings = json.loads((tmp_path / "sampling.json").read_text())
    assert settings["texts"] == {prompt.id: prompt.text for prompt in prompts} and settings["seed"] == 0
    run(pipeline, [Prompt("another", "a cat")], tmp_path)
    assert len(json.loads((tmp_path / "sampling.json").read_text())["texts"]) == 6
    assert settings["num_inference_steps"] == 4 and len(settings["model"]) == 16 and "batch_size" not in settings


def test_captions_with_any_line_break_are_recorded(pipeline, tmp_path):
    texts = ["a cat\u2028in the snow", "a cat\x85dog", "two\nlines\r\n", "plain"]
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    run(pipeline, prompts, tmp_path)
    assert len(complete_images(tmp_path, prompts)) == 4 and len(run(pipeline, prompts, tmp_path)) == 1


def test_an_error_claims_no_folder(pipeline, tmp_path):
    with pytest.raises(ValueError, match="as PNDM needs"):
        run(pipeline, storybook_prompts(1), tmp_path / "new", FolderSampling(num_inference_steps=3))
    assert not (tmp_path / "new").exists()


def test_a_folder_without_images_may_be_claimed_again(pipeline, tmp_path):
    next(sample_folder(pipeline, storybook_prompts(1), tmp_path, FAST.but(seed=1)))
    assert run(pipeline, storybook_prompts(1), tmp_path)[-1].done == 1


def test_only_missing_and_damaged_images_are_sampled_again(pipeline, tmp_path):
    prompts = storybook_prompts(12)
    run(pipeline, prompts, tmp_path)
    before = bits(tmp_path)
    image_path(tmp_path, prompts[3].id).unlink()
    damaged = image_path(tmp_path, prompts[7].id)
    damaged.write_bytes(damaged.read_bytes()[:100])
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir() if p != damaged}
    steps = run(pipeline, prompts, tmp_path)
    assert [len(step.newest) for step in steps] == [0, 2] and bits(tmp_path) == before
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir()}.items()
    assert [len(step.newest) for step in run(pipeline, storybook_prompts(13), tmp_path)] == [0, 1]


def test_images_of_two_models_settings_or_prompts_are_not_mixed(pipeline, tmp_path):
    prompts = storybook_prompts(2)
    run(pipeline, prompts, tmp_path)
    with pytest.raises(ValueError, match="num_inference_steps 4, now 5"):
        run(pipeline, prompts, tmp_path, FAST.but(num_inference_steps=5))
    with pytest.raises(ValueError, match="has images of model"):
        run(with_unet(pipeline, build_student(pipeline.unet, "bk_tiny")), prompts, tmp_path)
    with pytest.raises(ValueError, match="other prompts under the same ids"):
        run(pipeline, [Prompt("test-0", "something else")], tmp_path)
    assert len(bits(tmp_path)) == 2


def test_images_of_unknown_origin_are_left_as_they_are(pipeline, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    with pytest.raises(ValueError, match="no sampling.json"):
        run(pipeline, storybook_prompts(2), tmp_path)


def test_only_the_images_asked_for_are_deleted(pipeline, tmp_path, monkeypatch):
    prompts = storybook_prompts(4)
    run(pipeline, prompts, tmp_path)
    delete_images(tmp_path, prompts[:2])
    kept = {prompt.id for prompt in prompts[2:]}
    assert set(complete_images(tmp_path, prompts)) == kept
    run(pipeline, [Prompt("test-0", "another text"), *prompts[1:]], tmp_path)
    with pytest.raises(ValueError, match="of 'another text', now it is"):
        complete_images(tmp_path, prompts)
    monkeypatch.setattr(folders, "running", lambda folder: True)
    with pytest.raises(ValueError, match="wait for them, or stop them"):
        delete_images(tmp_path, prompts)


def test_a_folder_that_was_not_sampled_is_named(tmp_path):
    with pytest.raises(ValueError, match="tpyo has no sampling.json"):
        complete_images(tmp_path / "tpyo", [])


def test_models_and_settings_have_their_own_folder(tmp_path):
    one, same, other = (folder_of(tmp_path, "a", "b", FAST.but(guidance_scale=g)) for g in (4, 4.0, 5))
    assert one == same != other != folder_of(tmp_path, "a", "c", FAST.but(guidance_scale=5)) and not one.exists()
    assert folder_of(tmp_path, "a", "b", FAST.but(batch_size=3)) == folder_of(tmp_path, "a", "b", FAST)


def test_a_running_generator_gives_what_the_originals_loop_gives(pipeline_dir, tmp_path):
    pipeline = load_pipeline(pipeline_dir)
    prompts = [Prompt(str(i), text) for i, text in enumerate(("a cat", "a dog", "a house", "a tree", "a star"))]
    sampling = FAST.but(noise="running", batch_size=2, seed=1234)
    run(pipeline, prompts, tmp_path / "whole", sampling)
    generator, expected = torch.Generator().manual_seed(1234), []
    for start in (0, 2, 4):
        texts = [prompt.text for prompt in prompts[start : start + 2]]
        options = {"num_inference_steps": FAST.num_inference_steps, "guidance_scale": FAST.guidance_scale}
        expected += with_scheduler(pipeline, FAST.scheduler)(texts, generator=generator, **options).images
    for prompt, image in zip(prompts, expected, strict=True):
        assert_same(Image.open(image_path(tmp_path / "whole", prompt.id)), image)
    image_path(tmp_path / "whole", "3").unlink()  # sampled again from the same noise, its neighbour kept
    kept = image_path(tmp_path / "whole", "2").stat().st_mtime_ns
    run(pipeline, prompts, tmp_path / "whole", sampling)
    assert_same(Image.open(image_path(tmp_path / "whole", "3")), expected[3])
    assert image_path(tmp_path / "whole", "2").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="batch_size 2, now 3"):
        run(pipeline, prompts, tmp_path / "whole", sampling.but(batch_size=3))


def assert_same(one, other):
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
