import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, ViTConfig, ViTModel

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import ATTRIBUTES, sample_scene
from bksdm_utils.evaluation.metrics import (
    Score,
    clip_score,
    fid,
    half_sample_error,
    inception_score,
    kid,
    mean_score,
    zero_shot_accuracy,
)
from bksdm_utils.evaluation.networks import MetricClip, dino
from bksdm_utils.files import ROOT, NotAvailable

CLIP = ROOT / "data" / "storybook" / "clip"


@pytest.fixture(scope="module")
def clip():
    return MetricClip(CLIP)


@pytest.fixture(scope="module")
def real():
    scenes = [sample_scene(seed, "test", pair_share=0.0) for seed in range(128)]
    return scenes, [render(scene, seed) for seed, scene in enumerate(scenes)]


def test_the_clip_model_names_held_out_renders(clip, real):
    scenes, images = real
    accuracy = zero_shot_accuracy(clip, images, scenes)
    assert set(accuracy) == set(ATTRIBUTES) and min(accuracy.values()) >= 0.97


def test_the_clip_score_is_high_for_right_captions_only(clip, real):
    scenes, images = real
    captions, grey = [scene.caption for scene in scenes], [Image.new("RGB", (64, 64), "grey")] * len(images)
    right, wrong, empty = (clip_score(clip, some, captions) for some in (images, images[1:] + images[:1], grey))
    assert right > wrong + 0.2 and empty < right / 2


def test_images_are_resized_by_pillow(clip):
    image = render(sample_scene(1), 1, 150)
    resized = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) / 255
    expected = (resized - clip.processor.image_mean) / clip.processor.image_std
    assert np.abs(clip.image_network.prepare(image).permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_each_image_needs_a_caption(clip, real):
    with pytest.raises(ValueError, match="one caption for each image"):
        clip_score(clip, real[1], ["a cat"])


def test_images_of_two_objects_have_a_relation_and_no_attributes(clip):
    pairs = [sample_scene(seed, "test", pair_share=1.0) for seed in range(128)]
    accuracy = zero_shot_accuracy(clip, [render(scene, seed) for seed, scene in enumerate(pairs)], pairs)
    assert list(accuracy) == ["relation"] and accuracy["relation"] >= 0.9


def test_networks_saved_in_half_precision_compute_in_full(clip, real, tmp_path):
    for part in (CLIPModel.from_pretrained(CLIP).half(), clip.tokenizer, clip.processor):
        part.save_pretrained(tmp_path / "clip")
    half = MetricClip(tmp_path / "clip")
    captions = [scene.caption for scene in real[0][:8]]
    assert clip_score(half, real[1][:8], captions) == pytest.approx(clip_score(clip, real[1][:8], captions), abs=1e-2)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ViTModel(config).half().save_pretrained(tmp_path / "dino")
    features = dino(path=str(tmp_path / "dino"))(real[1][:2])
    assert features.dtype is torch.float32 and features.shape == (2, 8)


@pytest.mark.parametrize("make", [MetricClip, lambda path: dino(path=path)])
def test_a_damaged_network_is_not_a_missing_one(make, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="could not be loaded") as raised:
        make(str(tmp_path))
    assert not isinstance(raised.value, NotAvailable)


def test_fid_is_the_distance_of_gaussians():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 3, generator=rng).double(), torch.randn(400, 3, generator=rng).double()
    assert fid(a, a) == pytest.approx(0, abs=1e-6) and fid(a, a + torch.tensor([3.0, 4, 0])) == pytest.approx(25)
    one, other = (torch.from_numpy(np.cov(x.numpy(), rowvar=False)) for x in (a, 2 * b))
    roots = torch.linalg.eigvals(one @ other).real.sqrt().sum()  # trace of the matrix square root
    expected = (a.mean(0) - 2 * b.mean(0)).square().sum() + one.trace() + other.trace() - 2 * roots
    assert fid(a, 2 * b) == pytest.approx(expected.item(), rel=1e-6)


def test_kid_is_near_zero_for_the_same_distribution_only():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 16)), rng.normal(size=(300, 16))
    assert abs(kid(x, y).value) < 4 * kid(x, y).error and kid(x, y + 1).value > 20 * kid(x, y + 1).error


def test_half_samples_give_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    error = half_sample_error(lambda chosen: values[chosen].mean(), 400, repeats=400)
    assert error == pytest.approx(values.std() / 20, rel=0.15)
    assert mean_score(values).error == pytest.approx(values.std() / 20, rel=0.01)


def test_the_inception_score_of_certain_and_varied_classes_is_their_number():
    certain = 50 * np.eye(10)[np.arange(1000) % 10]
    assert inception_score(certain).value == pytest.approx(10, abs=0.5)
    assert inception_score(np.zeros((1000, 10))).value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(3.702, 0.974, "3.7 ± 1.0"), (0.8793, 0.0091, "0.879 ± 0.009"), (0.8793, 0.012, "0.879 ± 0.012"),
     (-0.00145, 0.043, "-0.00 ± 0.04"), (84.4, 12, "84 ± 12"), (1.0, 0.0, "1"), (2.0, float("nan"), "2")],
)  # fmt: skip
def test_a_score_has_the_digits_of_its_error(value, error, text):
    assert str(Score(value, error)) == text
