"""Scores of subjects, and the study of notebook 05: what is sampled, kept, scored and written down."""

import json

import numpy as np
import pytest
from transformers import ViTConfig, ViTModel

from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.data.rendering import render, render_subject
from bksdm_utils.data.scenes import PLACES, Scene, Thing
from bksdm_utils.dreambooth.job import prepare
from bksdm_utils.dreambooth.study import Study, load_models, mean_table, score_table, subject_scores
from bksdm_utils.dreambooth.subjects import load_subject
from bksdm_utils.evaluation.networks import MetricClip, dino
from bksdm_utils.files import ROOT, write_json


@pytest.fixture(scope="module")
def clip():
    return MetricClip(ROOT / "data" / "storybook" / "clip")


def test_scores_distinguish_the_subject_from_its_class(clip):
    subject, texts = load_subject("tabby"), [f"a cat {place}" for place in PLACES]
    same = [render_subject("tabby", place, 100 + i) for i, place in enumerate(PLACES)]
    other = [render(Scene((Thing("big", "green", "cat"),), place), i) for i, place in enumerate(PLACES)]
    right, wrong = (subject_scores(clip, None, images, subject.images, texts) for images in (same, other))
    assert right["clip_i"].value > wrong["clip_i"].value + 0.2 and set(right) == {"clip_i", "clip_t"}
    cosine = (clip.images(same)[:, None] * clip.images(subject.images)[None]).sum(-1)
    assert right["clip_i"].value == pytest.approx(cosine.mean().item(), abs=1e-5)


def test_dino_adds_its_score(clip, tmp_path):
    config = ViTConfig(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    network, subject = dino(path=str(tmp_path)), load_subject("koi")
    assert network(subject.images).shape == (5, 384)
    scores = subject_scores(clip, network, subject.images, subject.images, ["a fish"] * 5)
    assert 0.2 < scores["dino"].value <= 1


def test_the_last_row_of_the_table_is_the_mean_over_subjects():
    rows = [{"subject": "a", "clip_i": (0.2, 0.01)}, {"subject": "b", "clip_i": (0.4, 0.02), "dino": (0.5, 0.1)}]
    result = mean_table(rows)
    assert list(result["subject"]) == ["a", "b", "mean"]
    assert [float(text.split()[0]) for text in result["clip_i"]] == pytest.approx([0.2, 0.4, 0.3])


@pytest.fixture
def config(pipeline_dir, tmp_path):
    return DreamBoothTraining.filled(
        teacher=str(pipeline_dir), device="cpu", models="teacher", subject="tabby", max_train_steps=3, batch_size=2,
        num_class_images=2, num_images=1, num_inference_steps=4, guidance_scale=1, lora_targets="to_q,to_v",
        resolution=64, images_dir=str(tmp_path / "images"), methods="lora",
    )  # fmt: skip


@pytest.mark.slow
def test_a_study_samples_trains_scores_and_is_written(config, clip, tmp_path):
    models, subject = load_models(config, tmp_path / "none", "bk_small"), load_subject("tabby")
    study = Study(config, subject, models, tmp_path, clip)
    before = study.evaluate("teacher", "before", models["teacher"])
    assert [text for text, _ in study.class_images("teacher")] == list(subject.class_prompts[:2])
    config = config.for_method("lora")
    run = prepare(models["teacher"], subject, config, tmp_path / "teacher-lora", study.class_images("teacher"))
    for step in run.steps():
        if step.step == 1:
            study.validate("teacher", run)
    study.finish("teacher", run)
    assert [point["step"] for point in study.along["teacher, lora"]] == [0, 1, 3]
    assert study.along["teacher, lora"][0]["clip_i"] == before["clip_i"].value
    assert len(study.losses["teacher, lora"]) == 3 and study.costs["teacher, lora"]["file MB"] > 0
    write_json(tmp_path / "result.json", study.metrics())
    metrics = json.loads((tmp_path / "result.json").read_text())
    assert set(metrics["scores"]) == {"teacher, before", "teacher, lora"} and metrics["num_images"] == 8
    assert set(metrics["drift"]) == {"before", "lora"} and metrics["networks"] == [clip.key]
    assert list(score_table(study.scores()).index) == ["teacher, before", "teacher, lora"]
    assert study.key_figure().startswith("tabby: CLIP-I teacher, lora")
    again = Study(config, subject, models, tmp_path)
    kept = sorted((tmp_path / "images").rglob("*.png"))
    assert again.evaluate("teacher", "before", models["teacher"]) == {} and again.metrics()["scores"] == {}
    assert sorted((tmp_path / "images").rglob("*.png")) == kept  # found by model and settings, not sampled again
    first, second = (s.evaluated["teacher", "before"].images for s in (study, again))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_study_without_models_is_empty(config, tmp_path):
    metrics = Study(config, None, {}, tmp_path).metrics()
    assert metrics["scores"] == metrics["costs"] == metrics["drift"] == {} and metrics["subject"] == "tabby"


def test_a_missing_student_is_left_out(config, tmp_path, capsys):
    models = load_models(config.but(models="teacher,student"), tmp_path / "none", "bk_small")
    assert set(models) == {"teacher"} and "no student in" in capsys.readouterr().out
    models["teacher"].unet.save_pretrained(tmp_path / "unet_ema")
    assert set(load_models(config.but(models="student"), tmp_path / "unet_ema", "bk_small")) == {"bk_small"}
