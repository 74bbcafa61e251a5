import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import fill_folder, renders
from PIL import Image

from bksdm_utils.config.evaluation import CocoEvaluation, FolderSampling
from bksdm_utils.config.presets import PRESETS
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation import evaluator as module
from bksdm_utils.evaluation import folders
from bksdm_utils.evaluation.evaluator import Evaluator, by_short_name, distance_to
from bksdm_utils.evaluation.folders import complete_images, image_path, sample_folder
from bksdm_utils.evaluation.metrics import Score, Statistics, clip_score
from bksdm_utils.evaluation.networks import MetricClip, Network, dino
from bksdm_utils.evaluation.prompts import Prompt, read_prompts, storybook_prompts
from bksdm_utils.evaluation.protocols import PROTOCOLS, Protocol, as_paper, as_stored
from bksdm_utils.files import ROOT, NotAvailable
from bksdm_utils.models.pipelines import load_pipeline

CLIP = ROOT / "data" / "storybook" / "clip"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def evaluator(cache):
    """With fewer real renders than notebook 04 has."""
    with pytest.MonkeyPatch.context() as patch:
        original = module.real_images
        patch.setattr(module, "real_images", lambda path: original(path, 200))
        return Evaluator("storybook", cache_dir=cache)


def save_statistics(path, statistics, network):
    np.savez(path, mu=statistics.mean, sigma=statistics.covariance, network=network)


def test_real_renders_have_the_scores_of_real_images(evaluator, tmp_path):
    images = renders(60)
    evaluation = evaluator.evaluate(tmp_path, fill_folder(tmp_path, images))
    assert evaluation.num_images == 60 and evaluation.skipped == [] and "biased" in evaluation.warning
    assert list(evaluation.scores) == list(module.SCORES)
    accuracies = ("size", "colour", "object", "place", "relation")
    assert min(evaluation.scores[name].value for name in accuracies) > 0.95
    assert evaluation.scores["fid"].value < 20
    assert abs(evaluation.scores["kid"].value) < 4 * evaluation.scores["kid"].error
    captions, opened = zip(*images.values(), strict=True)
    expected = clip_score(evaluator.clip, opened, captions)
    assert evaluation.scores["clip_score"].value == pytest.approx(expected, abs=1e-5)
    assert list(evaluation.clip_scores.values()) == sorted(evaluation.clip_scores.values())
    assert all(evaluation.scores[name].error > 0 for name in ("fid", "kid", "clip_score"))


def test_a_new_score_is_one_line_of_the_registry(evaluator, tmp_path, monkeypatch):
    monkeypatch.setitem(module.SCORES, "width", lambda images: Score(images.open(0).width, 0.0))
    monkeypatch.setitem(module.SCORES, "not for these", lambda images: None)
    evaluation = evaluator.evaluate(tmp_path, fill_folder(tmp_path, renders(20)))
    assert evaluation.scores["width"] == (64, 0) and "not for these" not in evaluation.scores


def test_scores_are_read_again_for_the_same_images_only(evaluator, tmp_path, monkeypatch):
    prompts = fill_folder(tmp_path, renders(41))
    first = evaluator.evaluate(tmp_path, prompts[:40])
    computed = []
    network = evaluator.clip.image_network
    counting = replace(network, forward=lambda pixels: computed.append(len(pixels)) or network.forward(pixels))
    monkeypatch.setitem(evaluator.clip.__dict__, "image_network", counting)
    monkeypatch.setattr(evaluator, "features", counting)
    assert evaluator.evaluate(tmp_path, prompts[:40]) == first and not computed
    more = evaluator.evaluate(tmp_path, prompts)
    assert more.num_images == 41 and sum(computed) == 1  # one more image, one more row
    fill_folder(tmp_path, {"test-3": (prompts[3].text, render(sample_scene(3, "test"), 7))})
    changed = evaluator.evaluate(tmp_path, prompts)
    assert changed.key != more.key and changed.scores != more.scores and sum(computed) == 2


def test_scores_do_not_depend_on_the_order_of_the_prompts(evaluator, tmp_path):
    prompts = fill_folder(tmp_path, renders(40))
    first = evaluator.evaluate(tmp_path, prompts)
    (tmp_path / "scores-storybook.json").unlink()
    assert evaluator.evaluate(tmp_path, prompts[::-1]) == first
    assert evaluator.fid_by_number(tmp_path, prompts[::-1], (30,)) == evaluator.fid_by_number(tmp_path, prompts, (30,))


def test_undefined_scores_are_read_back(evaluator, tmp_path, monkeypatch):
    monkeypatch.setitem(module.SCORES, "undefined", lambda images: Score(float("nan"), float("nan")))
    prompts = fill_folder(tmp_path, renders(20))
    for _ in range(2):
        assert np.isnan(evaluator.evaluate(tmp_path, prompts).scores["undefined"]).all()


@pytest.mark.slow
def test_scores_against_statistics_and_images_have_two_keys(evaluator, tmp_path):
    prompts = fill_folder(tmp_path / "images", renders(20))
    save_statistics(tmp_path / "real.npz", evaluator.real, evaluator.features.key)
    statistics_only = Evaluator("storybook", tmp_path / "real.npz", cache_dir=tmp_path)
    ours, theirs = (e.evaluate(tmp_path / "images", prompts) for e in (evaluator, statistics_only))
    assert ours.key != theirs.key and "kid" in ours.scores and "kid" not in theirs.scores
    assert ours.scores["fid"] == theirs.scores["fid"]


def test_features_and_scores_of_another_version_are_not_read(evaluator, tmp_path, monkeypatch):
    prompts = fill_folder(tmp_path, renders(20))
    before = evaluator.evaluate(tmp_path, prompts).key
    monkeypatch.setattr(module, "VERSION", 999)
    assert evaluator.evaluate(tmp_path, prompts).key != before
    assert len(list(tmp_path.glob("features-999-*"))) == 2


def test_other_captions_under_the_same_ids_are_an_error(evaluator, tmp_path):
    prompts = fill_folder(tmp_path, renders(20))
    other = [*prompts[:7], Prompt(prompts[7].id, "a green dog"), *prompts[8:]]
    with pytest.raises(ValueError, match="test-7 of .*now it is 'a green dog'"):
        evaluator.evaluate(tmp_path, other)
    with pytest.raises(ValueError, match="now it is 'a green dog'"):
        distance_to(tmp_path, tmp_path, other)


def test_missing_and_damaged_images_are_set_aside_and_named(evaluator, tmp_path):
    prompts = fill_folder(tmp_path, renders(30), image_format="jpeg")
    image_path(tmp_path, "test-4").unlink()
    damaged = image_path(tmp_path, "test-9")
    damaged.write_bytes(damaged.read_bytes()[:-200])
    evaluation = evaluator.evaluate(tmp_path, prompts)
    assert evaluation.num_images == 28 and [id for id, _ in evaluation.skipped] == ["test-4", "test-9"]
    assert "sample the folder again" in evaluation.skipped[0][1]
    assert evaluator.evaluate(tmp_path, prompts) == evaluation
    fewer = [prompt for prompt in prompts if prompt.id != "test-9"]  # the same scores, another list
    again = evaluator.evaluate(tmp_path, fewer)
    assert again.key == evaluation.key and [id for id, _ in again.skipped] == ["test-4"]
    with pytest.raises(ValueError, match="scores need 20"):
        evaluator.evaluate(tmp_path, prompts[:15])


@pytest.mark.slow
def test_sampled_folders_are_scored_and_compared(evaluator, pipeline_dir, tmp_path):
    prompts, pipeline = storybook_prompts(24), load_pipeline(pipeline_dir)
    for seed, name in enumerate(("one", "other")):
        list(sample_folder(pipeline, prompts, tmp_path / name, FolderSampling(num_inference_steps=4, seed=seed)))
    evaluation = evaluator.evaluate(tmp_path / "one", prompts)
    assert evaluation.scores["clip_score"].value < 0.4 and evaluation.scores["fid"].value > 20
    assert distance_to(tmp_path / "one", tmp_path / "one", prompts) == Score(0, 0)
    assert distance_to(tmp_path / "one", tmp_path / "other", prompts).value > 1
    with pytest.raises(ValueError, match="no image in common"):
        distance_to(tmp_path / "one", tmp_path / "other", storybook_prompts(25)[24:])


@pytest.mark.slow
def test_fid_falls_with_the_number_of_images(evaluator, tmp_path):
    prompts = fill_folder(tmp_path, renders(120))
    fids = evaluator.fid_by_number(tmp_path, prompts, (30, 60, 120))
    assert fids[30].value > fids[60].value > fids[120].value > 0
    whole = evaluator.evaluate(tmp_path, prompts).scores["fid"].value
    assert fids[120].value == pytest.approx(whole, rel=1e-6) and fids[120].error == 0 < fids[30].error


def test_the_papers_view_is_jpeg_bicubic_jpeg():
    image = render(sample_scene(1), 1, 512)

    def through_files(image):  # as separate tools do it
        file = io.BytesIO()
        image.save(file, format="JPEG")  # Pillow's own quality is 75
        return Image.open(io.BytesIO(file.getvalue()))

    expected = through_files(through_files(image).resize((256, 256)))
    assert np.array_equal(np.asarray(as_paper(image)), np.asarray(expected))
    assert np.array_equal(np.asarray(as_paper(through_files(image))), np.asarray(expected))
    assert as_paper(Image.new("L", (640, 480))).size == (256, 256)


@pytest.mark.parametrize(("name", "fault"), [("small", "of another network or layer"),
                                             ("nameless", "a network that it does not name"),
                                             ("other", "is of another network: expected statistics of clip"),
                                             ("damaged", "expected an .npz")])  # fmt: skip
def test_statistics_of_another_network_are_an_error(evaluator, tmp_path, name, fault):
    clip = evaluator.clip.image_network
    np.savez(tmp_path / "small.npz", mu=np.zeros(8), sigma=np.eye(8))
    np.savez(tmp_path / "nameless.npz", mu=np.zeros(clip.dim), sigma=np.eye(clip.dim))
    save_statistics(tmp_path / "other.npz", Statistics(np.zeros(clip.dim), np.eye(clip.dim)), "other")
    (tmp_path / "damaged.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=fault):
        Statistics.load(tmp_path / f"{name}.npz", clip)
    if name == "nameless":
        Statistics.load(tmp_path / "nameless.npz", clip, nameless=True)  # the paper's published ones name none


def test_an_unknown_protocol_is_an_error():
    with pytest.raises(ValueError, match="protocol is 'papre': expected one of paper, clean, storybook"):
        Evaluator("papre")


@pytest.fixture
def nothing_downloaded(monkeypatch, tmp_path):
    """Weights that are on this machine are not found."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    for name in ("files", "evaluation.prompts", "evaluation.networks"):
        monkeypatch.setattr(f"bksdm_utils.{name}.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_what_is_not_downloaded_is_named_with_the_command(nothing_downloaded):
    with pytest.raises(NotAvailable, match="hf download laion/CLIP-ViT-g-14"):
        Evaluator("paper")
    with pytest.raises(NotAvailable, match="hf download facebook/dino"):
        dino()
    with pytest.raises(NotAvailable, match="coco_captions"):
        read_prompts(PRESETS["sd-v1.4"].values_for("CocoEvaluation")["prompts"])
    for protocol, weights, real in (("paper", "inception_pytorch_fid", "coco_statistics"),
                                    ("clean", "inception_clean_fid", "coco_images")):  # fmt: skip
        with pytest.raises(NotAvailable, match=f"download {weights}"):
            Evaluator(protocol, clip=str(CLIP))
        with pytest.raises(NotAvailable, match=real):
            Evaluator("storybook", real=PROTOCOLS[protocol].real, clip=str(CLIP))


def test_the_real_images_are_the_protocols_and_not_the_presets():
    assert CocoEvaluation.filled(preset="sd-v1.4", protocol="clean").real is None


@pytest.mark.parametrize("kwargs", [{"real": "tpyo.npz"}, {"real": "data/tpyo.zip"}, {"clip": "/clpi"}])
def test_a_mistyped_path_is_not_a_missing_download(kwargs, tmp_path):
    with pytest.raises(ValueError, match="missing|could not be loaded") as raised:
        Evaluator("storybook", cache_dir=tmp_path, **kwargs)
    assert not isinstance(raised.value, NotAvailable)


def test_students_with_similar_paths_have_different_names():
    paths = ["runs/a/unet", "/other/a/unet", "runs/b/unet", "runs/a/../a/unet/", "user/model"]
    named = by_short_name(paths)
    assert set(named.values()) == {"/other/a/unet", "runs/b/unet", "runs/a/../a/unet/", "user/model"}
    assert list(by_short_name(["runs/a/unet", "user/model"])) == ["a/unet", "user/model"]


def test_damaged_real_images_are_set_aside(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    for i in range(30):
        render(sample_scene(i), i).save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "real" / "damaged.jpg").write_bytes(b"\xff\xd8\xff not an image")
    (tmp_path / "real" / "again.png").write_bytes(
        (tmp_path / "real" / "0.png").read_bytes()
    )  # counts twice, as in zips
    evaluator = Evaluator("storybook", real=tmp_path / "real", cache_dir=tmp_path / "cache")
    assert len(evaluator.real_features) == 31 and "1 real images set aside" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no sampling.json"):
        evaluator.evaluate(tmp_path / "tpyo", storybook_prompts(20))
    assert not (tmp_path / "tpyo").exists()


class TinyClip:
    """A CLIP model of a few operations."""

    key = "tiny"

    def __init__(self, *_):
        grey = lambda image: torch.from_numpy(np.array(image)).float().flatten()[:8]  # noqa: E731
        letters = lambda text: torch.tensor([float(ord(letter)) for letter in text[-8:].rjust(8)])  # noqa: E731
        self.image_network = Network("tiny", "0", 8, grey, lambda x: x)
        self.text_network = Network("tiny_text", "0", 8, letters, lambda x: x)
        self.embed = lambda rows: torch.nn.functional.normalize(rows, dim=-1)


def seconds_of_folder(folder, count, pipeline):
    """Processor time of everything that reads a whole folder."""
    pixels = np.random.default_rng(0).integers(0, 255, (count, 4, 4, 3), np.uint8)
    images = {f"p{i}": (f"caption {i}", Image.fromarray(pixels[i])) for i in range(count)}
    sampling = FolderSampling(num_inference_steps=4)
    prompts = fill_folder(folder, images, settings=folders._settings("m", sampling))
    evaluator = Evaluator("tiny", folder.parent / "real.npz")
    work = {
        "complete": lambda: complete_images(folder, prompts),
        "resume": lambda: list(sample_folder(pipeline, prompts, folder, sampling, "m")),
        "evaluate": lambda: evaluator.evaluate(folder, prompts),
        "evaluate again": lambda: evaluator.evaluate(folder, prompts),
    }
    seconds = {}
    for name, function in work.items():
        start = time.process_time()
        assert function()
        seconds[name] = time.process_time() - start
    return seconds


@pytest.mark.nightly
def test_the_time_of_a_folder_is_proportional_to_its_images(tmp_path, pipeline_dir, monkeypatch):
    classes = Network("classes", "0", 8, lambda x: torch.from_numpy(np.array(x)).float().flatten()[-8:], lambda x: x)
    monkeypatch.setitem(PROTOCOLS, "tiny", Protocol("tiny", as_stored, "tiny", classes=lambda _: classes))
    monkeypatch.setattr(module, "MetricClip", TinyClip)
    save_statistics(tmp_path / "real.npz", Statistics(np.zeros(8), np.eye(8)), "0")
    pipeline = load_pipeline(pipeline_dir)
    seconds_of_folder(tmp_path / "first", 100, pipeline)  # imports and the like
    few, many = (seconds_of_folder(tmp_path / str(count), count, pipeline) for count in (1000, 15_000))
    assert all(many[name] < 2.5 * 15 * few[name] + 0.5 for name in few), (few, many)


def test_stored_scores_are_plain_json(evaluator, tmp_path):
    evaluation = evaluator.evaluate(tmp_path, fill_folder(tmp_path, renders(20)))
    stored = json.loads((tmp_path / "scores-storybook.json").read_text())
    assert stored["key"] == evaluation.key and stored["scores"]["fid"] == list(evaluation.scores["fid"])
    assert isinstance(evaluator.clip, MetricClip)
