"""What DreamBooth trains: the loss, exact resumption, what is saved, and that plain diffusers loads it."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.core.surgery import build_student
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.dreambooth.job import DreamBoothModel, prepare
from bksdm_utils.dreambooth.subjects import class_prompts, load_subject
from bksdm_utils.evaluation.sampling import generate, image_seed
from bksdm_utils.files import ROOT
from bksdm_utils.models.hashes import model_hash
from bksdm_utils.models.lora import load_lora
from bksdm_utils.models.pipelines import load_pipeline, with_unet
from bksdm_utils.training.rng import BatchRng

FAST = {"num_inference_steps": 4, "guidance_scale": 2.0}
SMALL = DreamBoothTraining.filled(
    identifier="z", max_train_steps=4, batch_size=2, full_learning_rate=1e-3, lora_learning_rate=1e-2, lora_rank=4,
    lora_alpha=6, lora_targets="to_q,to_v", lora_text_rank=2, lora_text_alpha=3, train_text_encoder=True,
    lr_schedule="constant", prior_loss_weight=0, resolution=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture
def subject():
    return load_subject("tabby")


@pytest.fixture
def class_images(subject):
    return [(p.text, render(sample_scene(i), i)) for i, p in enumerate(class_prompts(subject, 3))]


def prepared(pipeline, subject, folder, method="lora", config=SMALL, class_images=(), **changes):
    config = config.but(prior_loss_weight=1.0 if class_images else 0.0, **changes)
    return prepare(pipeline, subject, config.for_method(method), folder, class_images)


def train(run):
    """Trains to the end; returns the losses."""
    return [float(step.losses["loss"]) for step in run.steps()]


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_equals_a_plain_computation(pipeline, subject, class_images, prediction_type, tmp_path):
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    other = with_unet(pipeline, pipeline.unet)
    other.scheduler = scheduler
    run = replace(prepared(other, subject, tmp_path, "full", class_images=class_images), prior_loss_weight=0.5)
    ours, pipeline = run.losses(run.model, run.batches(BatchRng(7, 5, range(2), 2, 5))), run.pipeline
    generators, expected = BatchRng(7, 5, range(2), 2, 5).generators, {}
    for name, (mean, std, token_ids) in zip(("loss_instance", "loss_prior"), run.batches.encoded, strict=True):
        shape, errors, size = mean.shape[1:], [], len(mean)
        sampling, noise = ([torch.randn(shape, generator=g) for g in generators] for _ in range(2))
        times = [torch.randint(1000, (1,), generator=g) for g in generators]
        for k, i in enumerate(BatchRng(7, 5, range(2), 2, size).indices):
            x = mean[i] + std[i] * sampling[k]
            alpha = scheduler.alphas_cumprod[times[k]].item()
            noisy = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise[k]
            v = alpha**0.5 * noise[k] - (1 - alpha) ** 0.5 * x
            hidden_states = pipeline.text_encoder(token_ids[i][None])[0]
            prediction = pipeline.unet(noisy[None], times[k], encoder_hidden_states=hidden_states).sample[0]
            errors.append(F.mse_loss(prediction, v if prediction_type == "v_prediction" else noise[k]))
        expected[name] = sum(errors).item() / len(errors)
    expected["loss"] = expected["loss_instance"] + 0.5 * expected["loss_prior"]
    assert {name: value.item() for name, value in ours.items()} == pytest.approx(expected, rel=1e-5)
    batch = replace(run.batches, encoded=run.batches.encoded[:1])(BatchRng(7, 5, range(2), 2, 5))
    without = replace(run, prior_loss_weight=0.0).losses(run.model, batch)
    assert set(without) == {"loss", "loss_instance"}
    assert without["loss"].item() == pytest.approx(expected["loss_instance"], rel=1e-5)


def test_only_the_requested_parameters_are_trained(pipeline_dir):
    def trained(method, text):
        pipeline = load_pipeline(pipeline_dir)
        linears = [m for n, m in pipeline.unet.named_modules() if n.endswith(("to_q", "to_v"))]
        texts = [m for n, m in pipeline.text_encoder.named_modules() if n.endswith(("q_proj", "v_proj"))]
        counts = [sum(p.numel() for p in part.parameters()) for part in (pipeline.unet, pipeline.text_encoder)]
        model = DreamBoothModel(pipeline, SMALL.but(train_text_encoder=text).for_method(method))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        adapters = [rank * (m.in_features + m.out_features) for rank, ms in ((4, linears), (2, texts)) for m in ms]
        return model.num_trained, names, adapters, counts

    number, _, _, counts = trained("full", True)
    assert number == sum(counts)
    assert trained("full", False)[0] == counts[0]
    number, names, adapters, _ = trained("lora", True)
    assert number == sum(adapters) and len(names) == 2 * len(adapters)
    assert all(".lora_" in name for name in names)
    assert not any("text_encoder" in name for name in trained("lora", False)[1])


PLAIN_DIFFUSERS = """
import sys, torch, numpy as np
from diffusers import StableDiffusionPipeline
base, lora, seeds, prompts, output = eval(sys.argv[1])
pipe = StableDiffusionPipeline.from_pretrained(base)
if lora:
    pipe.load_lora_weights(lora)
assert not any(name.startswith("bksdm") for name in sys.modules)
generators = [torch.Generator().manual_seed(seed) for seed in seeds]
images = pipe(prompts, generator=generators, num_inference_steps=4, guidance_scale=2.0).images
np.save(output, np.stack([np.asarray(image) for image in images]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_plain_diffusers_gives_the_same_images(pipeline_dir, subject, tmp_path, method):
    run = prepared(load_pipeline(pipeline_dir), subject, tmp_path / "run", method)
    assert len(train(run)) == 4
    prompts, saved = ["a z cat at night", "a z cat on the sea"], tmp_path / "run" / "saved"
    ours = pixels(generate(run.pipeline, prompts, **FAST))
    assert run.save() > 1000
    base, lora = (str(saved), None) if method == "full" else (str(pipeline_dir), str(saved))
    argument = repr((base, lora, [image_seed(0, 0), image_seed(0, 1)], prompts, str(tmp_path / "images.npy")))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, argument], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "images.npy").astype(int) - ours).max() <= 1
    assert np.abs(pixels(generate(load_pipeline(pipeline_dir), prompts, **FAST)) - ours).max() > 3


@pytest.mark.slow
def test_a_merged_lora_gives_the_same_images(pipeline_dir, subject, tmp_path):
    run = prepared(load_pipeline(pipeline_dir), subject, tmp_path / "run")
    train(run)
    run.save()
    ours = pixels(generate(run.pipeline, ["a z cat at night"], **FAST))
    base = load_pipeline(pipeline_dir)
    key = model_hash(base)
    merged = load_lora(base, tmp_path / "run" / "saved", ("unet", "text_encoder"))
    assert model_hash(base) == key  # unchanged
    images = pixels(generate(merged, ["a z cat at night"], **FAST))
    assert np.abs(images - ours).max() <= 1
    merged.save_pretrained(tmp_path / "merged")
    again = generate(load_pipeline(tmp_path / "merged"), ["a z cat at night"], **FAST)
    assert np.array_equal(pixels(again), images)


@pytest.mark.slow
def test_a_lora_of_another_model_is_refused(pipeline_dir, subject, tmp_path):
    """Diffusers would load either silently: it ignores layers that do not exist, and others get the wrong adapters."""

    def student():
        base = load_pipeline(pipeline_dir)
        return with_unet(base, build_student(base.unet, "bk_small"))

    for name, base, other in (("teacher", lambda: load_pipeline(pipeline_dir), student),
                              ("student", student, lambda: load_pipeline(pipeline_dir))):  # fmt: skip
        prepared(base(), subject, tmp_path / name).save()
        with pytest.raises(ValueError, match="another architecture"):
            load_lora(other(), tmp_path / name / "saved")
    file = tmp_path / "teacher" / "saved" / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)  # as others write it, without the name of the base
    with pytest.raises(ValueError, match="trained on another model: .* tensors"):
        load_lora(student(), tmp_path / "teacher" / "saved")


def test_a_lora_of_the_unet_has_nothing_for_the_text_encoder(pipeline_dir, subject, tmp_path):
    prepared(load_pipeline(pipeline_dir), subject, tmp_path, train_text_encoder=False).save()
    with pytest.raises(ValueError, match="nothing for text_encoder"):
        load_lora(load_pipeline(pipeline_dir), tmp_path / "saved", ("unet", "text_encoder"))


def test_half_precision_pipelines_are_trained_in_full_precision(pipeline_dir, subject, tmp_path):
    half = load_pipeline(pipeline_dir, dtype=torch.bfloat16)
    run = prepared(half, subject, tmp_path, "full", gradient_checkpointing=True)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32} and half.unet.dtype == torch.bfloat16
    assert np.isfinite(train(run)).all()
    assert len(generate(run.pipeline, ["a z cat at night"], **FAST)) == 1
    assert run.trainer.training_bytes()["ema"] == 0 and not list(tmp_path.rglob("*_ema"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_run_resumes_bit_for_bit(pipeline, subject, class_images, tmp_path, method):
    options = {"method": method, "class_images": class_images, "checkpoint_steps": 2}
    whole = prepared(pipeline, subject, tmp_path / "whole", **options)
    losses = train(whole)
    stopped = prepared(pipeline, subject, tmp_path / "stopped", **options)
    for step in stopped.steps():
        if step.step == 3:
            break  # the checkpoint is of step 2
    resumed = prepared(pipeline, subject, tmp_path / "stopped", **options, resume=True)
    assert resumed.trainer.step == 2 and train(resumed) == losses[2:]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    checkpoint = sum(p.stat().st_size for p in whole.trainer.checkpoints.newest.rglob("*.safetensors"))
    assert checkpoint < 4 * whole.model.num_trained + 120_000  # of a LoRA only the adapters
    assert [row["step"] for row in resumed.log.rows] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="other settings"):
        prepared(pipeline, load_subject("koi"), tmp_path / "stopped", **options, resume=True)
    with pytest.raises(ValueError, match="other settings"):
        prepared(pipeline, subject, tmp_path / "stopped", **options, resume=True, identifier="y")


KILLED = """
import os, signal, sys
from pathlib import Path
from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.dreambooth.job import prepare
from bksdm_utils.dreambooth.subjects import load_subject
from bksdm_utils.models.pipelines import load_pipeline
config = DreamBoothTraining.model_validate_json(sys.argv[3])
run = prepare(load_pipeline(sys.argv[1]), load_subject("tabby"), config, Path(sys.argv[2]))
for step in run.steps():
    if step.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_run_resumes_bit_for_bit(pipeline_dir, pipeline, subject, tmp_path, method):
    config = SMALL.but(checkpoint_steps=1).for_method(method).model_dump_json()
    command = [sys.executable, "-c", KILLED, str(pipeline_dir), str(tmp_path / "killed"), config]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    resumed = prepared(pipeline, subject, tmp_path / "killed", method, checkpoint_steps=1, resume=True)
    assert resumed.trainer.step == 2
    whole = prepared(pipeline, subject, tmp_path / "whole", method)
    assert train(whole)[2:] == train(resumed)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_v_prediction_pipelines_are_trained_on_v(pipeline, subject, tmp_path):
    other = with_unet(pipeline, pipeline.unet)
    other.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    losses = []
    for name, base in (("epsilon", pipeline), ("v_prediction", other)):
        run = prepared(base, subject, tmp_path / name)
        assert run.scheduler.config.prediction_type == name
        losses.append(float(next(iter(run.steps())).losses["loss"]))
    assert losses[0] != losses[1]  # of the same noise


def test_the_given_pipeline_is_unchanged(pipeline, subject, tmp_path):
    before = {name: t.clone() for name, t in pipeline.unet.state_dict().items()}
    train(prepared(pipeline, subject, tmp_path, "full"))
    assert all(torch.equal(t, before[name]) for name, t in pipeline.unet.state_dict().items())


def test_targets_and_pipelines_that_cannot_work_are_refused(pipeline_dir, pipeline_xl_dir):
    for targets in (("query",), ("to_q", "to_w"), ("o_q",)):  # PEFT takes those that exist
        with pytest.raises(ValueError, match="no layer of the UNet2DConditionModel is called"):
            DreamBoothModel(load_pipeline(pipeline_dir), SMALL.but(lora_targets=targets).for_method("lora"))
    with pytest.raises(ValueError, match="expected SD-v1 or SD-v2"):
        DreamBoothModel(load_pipeline(pipeline_xl_dir), SMALL.for_method("full"))
    for method, rate in (("full", 1e-3), ("lora", 1e-2)):
        assert SMALL.for_method(method).learning_rate == rate
