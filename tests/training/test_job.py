"""Whole distillation runs: with and without a notebook, in several processes, killed, in half precision."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SD_V2, narrow_parts
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from distilling import losses, newest, prepared, scores, trained, without_clock, write_config
from transformers import CLIPTextModel

from bksdm_utils.config.training import KDTraining
from bksdm_utils.evaluation.sampling import generate
from bksdm_utils.files import read_log
from bksdm_utils.models.configs import teacher_config
from bksdm_utils.models.pipelines import with_unet
from bksdm_utils.processes import finished, follow, launch, running, stop
from bksdm_utils.training.job import LOGS, train
from bksdm_utils.training.rng import BatchRng


def test_training_to_the_end_equals_the_notebooks_loop(narrow, tmp_path):
    rows, weights = trained(tmp_path / "notebook", **narrow)
    folder = tmp_path / "command"
    train(write_config(folder, **narrow), folder, "cpu", scores)
    assert without_clock(read_log(folder / "log.csv")) == without_clock(rows)
    assert all(torch.equal(weights[name], tensor) for name, tensor in newest(folder).items())
    assert [row["step"] for row in read_log(folder / "validation.csv")] == [0, 2, 4, 6]
    assert (folder / "unet_ema" / "config.json").exists()


def test_a_checkpoint_of_another_variant_is_refused(narrow, tmp_path):
    trained(tmp_path / "run", **narrow)
    with pytest.raises(ValueError, match="written with other settings .*bk_small.*bk_tiny"):
        trained(tmp_path / "run", **{**narrow, "variant": "bk_tiny", "resume": True})


def test_fewer_images_than_a_batch_are_repeated(narrow, tmp_path):
    rows, _ = trained(tmp_path / "run", **{**narrow, "batch_size": 12, "max_train_steps": 2})
    assert len(rows) == 2 and all(np.isfinite(losses(rows)))


@pytest.fixture
def another_precision():
    """accelerate keeps the first precision of a process until its state is reset."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_half_precision_keeps_full_weights_and_samples(narrow, tmp_path, monkeypatch, another_precision):
    rows, _ = trained(tmp_path / "full", **narrow)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("bksdm_utils.training.job.precision", lambda *_: "bf16")  # slow on a CPU, but the same code
    job = prepared(tmp_path / "half", **narrow)
    half = [rows for rows, _ in job.progress()][-1]
    assert job.pipe.unet.dtype == job.pipe.text_encoder.dtype == torch.bfloat16
    assert job.pipe.vae.dtype == job.student.dtype == torch.float32
    assert losses(half) == pytest.approx(losses(rows), rel=0.05) and losses(half) != losses(rows)
    image = generate(with_unet(job.pipe, job.student), ["a cat"], num_inference_steps=4)[0]
    assert np.asarray(image).std() > 0


def test_every_switch_trains(narrow, tmp_path):
    switches = {"gradient_checkpointing": True, "channels_last": False, "ema_device": "cpu", "find_batch_size": True,
                "random_conditioning": 5.0, "normalise_features": True, "kd": "self_attention"}  # fmt: skip
    rows, _ = trained(tmp_path / "run", **{**narrow, **switches, "max_train_steps": 2})
    assert all(np.isfinite(losses(rows)))


@pytest.mark.slow
def test_compiled_networks_are_tapped_though_they_ran_before(narrow, tmp_path, monkeypatch):
    """Traced as for a GPU, without the minutes that building its kernels takes."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    narrow |= {"max_train_steps": 2, "variant": "bk_tiny"}
    rows, _ = trained(tmp_path / "plain", **narrow)
    job = prepared(tmp_path / "compiled", **narrow, compiled=True)
    rng = BatchRng(0, 0, range(4), 4, len(job.data))
    latents, ids = job.data.batch(rng)
    for unet in (job.pipe.unet, job.student):
        unet(latents, torch.tensor([5, 5, 5, 5]), **job.conditioning(ids))
    compiled = [rows for rows, _ in job.progress()][-1]
    assert losses(compiled) == pytest.approx(losses(rows), rel=1e-5)
    torch._dynamo.reset()


def test_a_cell_run_twice_does_not_take_a_trained_student_for_a_fresh_one(narrow, tmp_path):
    job = prepared(tmp_path / "run", **narrow)
    next(job.progress())
    with pytest.raises(ValueError, match="trained already"):
        next(job.progress())


def test_in_half_precision_the_autoencoder_stays_in_full(narrow, pipeline_xl_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("bksdm_utils.training.job.precision", lambda *_: "fp16")
    changes = {"preset": "sdxl-base", "variant": "koala_700m", "teacher": str(pipeline_xl_dir)}
    job = prepared(tmp_path / "run", **{**narrow, **changes})
    assert job.pipe.vae.dtype is torch.float32  # SDXL's overflows in fp16
    assert {part.dtype for part in (job.pipe.unet, *job.conditioning.encoders)} == {torch.float16}


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


LAUNCH = "import sys; from pathlib import Path; from bksdm_utils.processes import launch; launch(Path(sys.argv[1]), 2)"


@pytest.mark.slow
def test_processes_outlive_their_starter_and_give_what_one_gives(narrow, tmp_path, capsys):
    """Started by a process that ends; followed, refused with other settings, stopped, started again."""
    narrow |= {"max_train_steps": 40, "learning_rate": 1e-5}
    rows, weights = trained(tmp_path / "one", **narrow)
    folder = tmp_path / "two"
    write_config(folder, **narrow)
    (tmp_path / "accelerate").mkdir()  # where this user's own launcher settings are, which must not count
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", LAUNCH, folder], check=True, env=environment)
    wait_for(lambda: read_log(folder / "log.csv"))
    assert running(folder)
    launch(folder, 2)
    assert "already running" in capsys.readouterr().out
    write_config(folder, **narrow, seed=1)
    with pytest.raises(ValueError, match="other settings are running"):
        launch(folder, 2)
    stop(folder)
    with pytest.raises(RuntimeError, match="ended before the work was finished"):
        list(follow(folder, every=0.1))
    done = read_log(folder / "log.csv")
    assert 0 < len(done) < 40 and f"step_{len(done):08}" in {p.name for p in (folder / "checkpoints").iterdir()}
    job = prepared(folder, **narrow, resume=True)
    for seen, _ in job.progress(num_processes=2):  # noqa: B007
        pass
    assert job.trainer.step == 40 and finished(folder)
    assert losses(job.log.rows) == pytest.approx(losses(rows), rel=1e-5)
    assert all(torch.allclose(t, weights[name], atol=1e-5) for name, t in job.student.state_dict().items())


@pytest.mark.slow
def test_the_reason_of_a_failure_is_reported(narrow, tmp_path):
    write_config(tmp_path / "run", **{**narrow, "train_data_dir": str(tmp_path / "nowhere/at/all")})
    launch(tmp_path / "run", 1)
    with pytest.raises(RuntimeError, match="(?s)ended before the work was finished.*nowhere"):
        list(follow(tmp_path / "run", every=0.1))


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_job import read_log, scores, train, write_config
folder, parameters, rng = Path(sys.argv[3]), json.loads(sys.argv[4]), random.Random(0)


def start():
    pid = os.fork()  # the libraries are imported once
    if not pid:
        train(write_config(folder, **parameters), folder, "cpu", scores)
        os._exit(0)
    return pid


for kill in range(20):  # the first ones while loading and encoding, the others while training
    pid, before, rows = start(), len(read_log(folder / "log.csv")), []
    ends = time.monotonic() + (rng.uniform(0, 1) if kill < 3 else 120)
    while time.monotonic() < ends and len(rows) <= before:
        time.sleep(0.005)
        rows = read_log(folder / "log.csv")
    time.sleep(2 * rng.random() * rows[-1]["seconds"] if rows else 0)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run ended before its kill"
assert os.waitpid(start(), 0)[1] == 0
"""


@pytest.mark.nightly
def test_a_run_killed_twenty_times_ends_bit_for_bit_as_an_unbroken_one(narrow, tmp_path):
    """SIGKILL while loading, encoding the cache, training, validating and writing checkpoints."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    narrow |= {"max_train_steps": 120, "validation_steps": 5, "checkpoint_steps": 1, "resume": True}
    train(write_config(whole, **narrow), whole, "cpu", scores)
    given = {**narrow, "cache_dir": str(killed / "cache")}
    tests = Path(__file__).parent
    command = [sys.executable, "-c", KILLS, str(tests), str(tests.parent), str(killed), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for part in ("unet", "unet_ema"):
        one, other = newest(whole, part), newest(killed, part)
        assert all(torch.equal(one[name], other[name]) for name in one)
    for name, count in zip(LOGS, (120, 25), strict=True):
        rows = without_clock(read_log(killed / name))
        assert rows == without_clock(read_log(whole / name)) and len(rows) == count


@pytest.mark.slow
def test_sd_v21_trains_v_prediction_at_768_pixels(narrow, tmp_path):
    """The architecture, scheduler and image size of SD-v2.1, narrow."""
    vae, tokenizer, text = narrow_parts()
    narrow_v2 = SD_V2 | {"block_out_channels": [8, 16, 32, 32], "cross_attention_dim": 16, "norm_num_groups": 4,
                         "attention_head_dim": [1, 2, 4, 4]}  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(narrow_v2),
        scheduler=DDIMScheduler.from_config(teacher_config(KDTraining.filled(preset="sd-v2.1"), "scheduler")),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(tmp_path / "teacher")  # fmt: skip
    changes = {"preset": "sd-v2.1", "teacher": str(tmp_path / "teacher"), "resolution": 768, "batch_size": 1,
               "max_train_steps": 1}  # fmt: skip
    folder = tmp_path / "run"
    job = prepared(folder, **{**narrow, **changes})
    assert job.config.resolution == 768 and job.data.shape == (4, 96, 96)
    assert job.noise_schedule.config.prediction_type == "v_prediction"
    rows = [rows for rows, _ in job.progress()][-1]
    assert np.isfinite(losses(rows)).all() and rows[0]["gradient_norm"] > 0
