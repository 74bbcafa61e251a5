"""Settings of DreamBooth that the original has too: each changes what is trained, in the way it says."""

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.dreambooth.job import prepare
from bksdm_utils.dreambooth.study import Study
from bksdm_utils.dreambooth.subjects import load_subject
from bksdm_utils.models.pipelines import load_pipeline

SMALL = DreamBoothTraining.filled(
    identifier="z", max_train_steps=4, batch_size=2, full_learning_rate=1e-3, lora_learning_rate=1e-2, lora_rank=4,
    lora_alpha=6, lora_targets="to_q,to_v", lora_text_rank=2, lora_text_alpha=3, train_text_encoder=True,
    lr_schedule="constant", prior_loss_weight=0, resolution=64, num_inference_steps=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture(scope="module")
def subject():
    return load_subject("tabby")


def run(pipeline, subject, folder, method="lora", **changes):
    """A prepared run, and the losses and the parts of the model that it leaves."""
    return prepare(pipeline, subject, SMALL.but(**changes).for_method(method), folder)


def losses(run):
    return [float(step.losses["loss"]) for step in run.steps()]


def flat(part):
    return torch.cat([p.detach().flatten() for p in part.parameters()])


@pytest.mark.parametrize("knob", ["lora_dropout", "lora_text_dropout"])
def test_dropout_of_adapters_acts_and_a_resumed_run_drops_the_same(pipeline, subject, tmp_path, knob):
    options = {knob: 0.5, "checkpoint_steps": 2}
    plain = losses(run(pipeline, subject, tmp_path / "plain"))
    whole = losses(run(pipeline, subject, tmp_path / "whole", **options))
    assert whole != plain
    cut = run(pipeline, subject, tmp_path / "cut", **options)
    for step in cut.steps():
        assert not cut.model.training  # who samples now drops nothing
        if step.step == 3:
            break
    torch.manual_seed(5)  # whatever the resuming process has drawn before
    assert losses(run(pipeline, subject, tmp_path / "cut", **options, resume=True)) == whole[2:]
    with pytest.raises(ValueError, match=knob):
        run(pipeline, subject, tmp_path / "cut", checkpoint_steps=2, resume=True)


def test_the_text_encoder_has_a_rate_of_its_own(pipeline, subject, tmp_path):
    def moved(name, **changes):
        training = run(pipeline, subject, tmp_path / name, "full", max_train_steps=1, weight_decay=0.0, **changes)
        before = [flat(part).clone() for part in (training.model.unet, training.model.text_encoder)]
        losses(training)
        after = [flat(part) for part in (training.model.unet, training.model.text_encoder)]
        return [(one - other).abs().max().item() for one, other in zip(after, before, strict=True)]

    alike, slower, still = moved("a"), moved("b", text_learning_rate=1e-4), moved("c", text_learning_rate=0.0)
    assert alike[0] == slower[0] == still[0] > 0 and still[1] == 0
    assert alike[1] == pytest.approx(1e-3, rel=0.02) and slower[1] == pytest.approx(
        1e-4, rel=0.02
    )  # AdamW's first step
    with pytest.raises(ValueError, match="expected one of more than 0"):
        run(pipeline, subject, tmp_path / "d", "full", text_learning_rate=1e-4, full_learning_rate=0.0)


def test_random_crops_are_more_images(pipeline, tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (64, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    wide = load_subject(str(folder), "fish")
    plain, cropped = (run(pipeline, wide, tmp_path / str(n), random_crops=n).batches for n in (0, 2))
    assert (plain.num_examples, cropped.num_examples) == (3, 6)
    mean, _, token_ids = cropped.encoded[0]
    assert not torch.allclose(mean[0], mean[1], atol=1e-2) and len(token_ids) == 6
    bilinear = run(pipeline, load_subject(str(folder), "fish"), tmp_path / "b", resolution=32, interpolation="bilinear")
    bicubic = run(pipeline, wide, tmp_path / "c", resolution=32)
    assert not torch.equal(bilinear.batches.encoded[0][0], bicubic.batches.encoded[0][0])


def test_accumulated_micro_batches_equal_one_batch(pipeline, subject, tmp_path):
    one = losses(run(pipeline, subject, tmp_path / "one"))
    two = losses(run(pipeline, subject, tmp_path / "two", batch_size=1, gradient_accumulation_steps=2))
    assert two == pytest.approx(one, rel=1e-5)


def test_class_images_may_come_from_a_folder(pipeline, subject, tmp_path):
    for i in range(3):
        Image.new("RGB", (70, 64), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    config = SMALL.but(prior_loss_weight=1.0, num_class_images=2, class_images_dir=str(tmp_path))
    study = Study(config, subject, {"m": pipeline}, tmp_path)
    captioned = study.class_images("m")
    assert [image.getpixel((0, 0))[0] for _, image in captioned] == [0, 60]
    assert [caption for caption, _ in captioned] == list(subject.class_prompts[:2])
    training = prepare(pipeline, subject, config.for_method("lora"), tmp_path / "run", captioned)
    assert len(training.batches.encoded[1][0]) == 2
    with pytest.raises(ValueError, match="no readable image"):
        empty = tmp_path / "empty"
        empty.mkdir()
        Study(config.but(class_images_dir=str(empty)), subject, {"m": pipeline}, tmp_path).class_images("m")


def test_class_images_may_be_another_models(pipeline, subject, pipeline_dir, tmp_path):
    torch.manual_seed(5)
    other = load_pipeline(pipeline_dir)
    other.unet.conv_out.weight.data.normal_()
    other.save_pretrained(tmp_path / "other")
    config = SMALL.but(
        prior_loss_weight=1.0, num_class_images=2, class_images_by=str(tmp_path / "other"), device="cpu",
        images_dir=str(tmp_path / "images"), num_inference_steps=4,
    )  # fmt: skip
    study = Study(config, subject, {"m": pipeline, "n": pipeline}, tmp_path)
    captioned = study.class_images("m")
    assert [caption for caption, _ in captioned] == list(subject.class_prompts[:2])
    own = Study(config.but(class_images_by=None), subject, {"m": pipeline}, tmp_path).class_images("m")
    assert own[0][1].tobytes() != captioned[0][1].tobytes()
    assert [image.tobytes() for _, image in study.class_images("n")] == [image.tobytes() for _, image in captioned]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"class_images_by": "a/b", "prior_loss_weight": 0.0}, "prior_loss_weight 0"),
     ({"class_images_by": "a/b", "class_images_dir": "c", "prior_loss_weight": 1.0}, "expected one of them")],
)  # fmt: skip
def test_contradicting_sources_of_class_images_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        SMALL.but(**changes)


def test_prompts_of_ones_own_are_sampled_on_the_way(pipeline, subject, tmp_path):
    config = SMALL.but(validation_prompts="a z cat, at night | a z cat on a boat", validation_steps=2)
    study = Study(config, subject, {"m": pipeline}, tmp_path)
    assert study.validation_steps == [2] and SMALL.but(max_train_steps=80).validation_steps is None
    assert Study(SMALL.but(max_train_steps=80), subject, {}, tmp_path).validation_steps == [26, 53]
    training = prepare(pipeline, subject, config.for_method("lora"), tmp_path / "run")
    for step in training.steps():
        if step.step in study.validation_steps:
            study.validate("m", training)
    (grid,) = (tmp_path / "run" / "validation").iterdir()
    assert grid.name == "step_00000002.png" and Image.open(grid).size == (2 * 64, 64)
