import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, ViTConfig, ViTModel

from bksdm_utils.config.presets import find_preset
from bksdm_utils.core.surgery import build_student
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import ATTRIBUTES, sample_scene
from bksdm_utils.evaluation.metrics import clip_score, fid, zero_shot_accuracy
from bksdm_utils.evaluation.networks import MetricClip, dino
from bksdm_utils.evaluation.scorer import PROMPTS, Scorer
from bksdm_utils.files import ROOT, NotAvailable
from bksdm_utils.models.pipelines import load_pipeline, with_unet

STORYBOOK = ROOT / "data" / "storybook"


@pytest.fixture(scope="module")
def judge():
    return MetricClip(STORYBOOK / "clip")


@pytest.fixture(scope="module")
def real():
    scenes = [sample_scene(seed, "test", pair_share=0.0) for seed in range(256)]
    return scenes, [render(scene, seed) for seed, scene in enumerate(scenes)]


def test_the_judge_names_real_held_out_renders(judge, real):
    scenes, pictures = real
    accuracy = zero_shot_accuracy(judge, pictures, scenes)
    assert set(accuracy) == set(ATTRIBUTES)
    assert min(accuracy.values()) >= 0.97


def test_the_clip_score_tells_right_from_wrong(judge, real):
    scenes, pictures = real
    captions = [scene.caption for scene in scenes]
    assert clip_score(judge, pictures, captions) > clip_score(judge, pictures[1:] + pictures[:1], captions) + 0.2


def test_the_clip_score_of_grey_pictures_is_low(judge, real):
    scenes, pictures = real
    grey = [Image.new("RGB", (64, 64), "grey")] * len(pictures)
    captions = [scene.caption for scene in scenes]
    assert clip_score(judge, grey, captions) < clip_score(judge, pictures, captions) / 2


def test_as_many_captions_as_pictures(judge, real):
    with pytest.raises(ValueError, match="one caption for each picture"):
        clip_score(judge, real[1], ["a cat"])


def test_accuracy_needs_pictures_of_one_thing(judge, real):
    pair = next(s for s in map(sample_scene, range(50)) if len(s.things) == 2)
    with pytest.raises(ValueError, match="no picture of a single object"):
        zero_shot_accuracy(judge, real[1][:1], [pair])


def test_judges_saved_in_half_precision_judge_in_full(judge, real, tmp_path):
    for part in (CLIPModel.from_pretrained(STORYBOOK / "clip").half(), judge.tokenizer, judge.processor):
        part.save_pretrained(tmp_path / "clip")
    half = MetricClip(tmp_path / "clip")
    captions = [scene.caption for scene in real[0][:8]]
    assert clip_score(half, real[1][:8], captions) == pytest.approx(clip_score(judge, real[1][:8], captions), abs=1e-2)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ViTModel(config).half().save_pretrained(tmp_path / "dino")
    network = dino(place=str(tmp_path / "dino"))
    assert network(real[1][:2]).dtype is torch.float32 and network(real[1][:2]).shape == (2, 8)


def test_a_broken_judge_is_not_taken_for_a_missing_one(tmp_path):
    (tmp_path / "config.json").write_text("{")
    for make in (MetricClip, lambda place: dino(place=place)):
        with pytest.raises(ValueError, match="looked for a folder") as found:
            make(str(tmp_path))
        assert not isinstance(found.value, NotAvailable)


def test_without_a_judge_nothing_is_scored():
    scorer = Scorer(find_preset("sd-v1.4"))
    assert scorer.captions == list(PROMPTS) and scorer.scores([]) == {}
    assert all(value != value for value in scorer.proxy(None).values())  # NaN


def test_fid_is_the_distance_of_gaussians():
    chance = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 3, generator=chance).double(), torch.randn(400, 3, generator=chance).double()
    assert fid(a, a) == pytest.approx(0, abs=1e-6) and fid(a, a + torch.tensor([3.0, 4, 0])) == pytest.approx(25)
    one, other = (torch.from_numpy(np.cov(x.numpy(), rowvar=False)) for x in (a, 2 * b))
    roots = torch.linalg.eigvals(one @ other).real.sqrt().sum()  # trace of the matrix square root
    expected = (a.mean(0) - 2 * b.mean(0)).square().sum() + one.trace() + other.trace() - 2 * roots
    assert fid(a, 2 * b) == pytest.approx(expected.item(), rel=1e-6)


def test_the_proxy_tells_the_teacher_from_a_cut_student():
    scorer = Scorer(find_preset("storybook", num_images=1, num_validation_images=16))
    pipe = load_pipeline(scorer.settings.teacher)
    teacher, cut = scorer.proxy(pipe), scorer.proxy(with_unet(pipe, build_student(pipe.unet, "bk_small")))
    assert teacher["clip_score"] > cut["clip_score"] + 0.5 and teacher["fid"] < cut["fid"]
    tested = {scene.caption for scene in scorer.scenes}
    assert not tested & {scene.caption for scene in scorer.validation_scenes}


def test_the_committed_scores_hold_the_bar():
    scores = json.loads((STORYBOOK / "scores.json").read_text())
    assert scores["num_images"] == 256 and scores["psnr"] >= 26
    assert scores["teacher"]["clip_score"] >= 0.9 * scores["real"]["clip_score"]
    assert scores["teacher"]["object"] >= 0.85 and scores["teacher"]["colour"] >= 0.9
    assert scores["teacher"]["place"] >= 0.95


def test_the_committed_teacher_is_small_and_loads_without_this_package(tmp_path):
    files = [path for path in STORYBOOK.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    program = (
        "import sys; from diffusers import StableDiffusionPipeline\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({str(STORYBOOK / 'teacher')!r})\n"
        "picture = pipe('a big red cat at night', num_inference_steps=4).images[0]\n"
        "assert picture.size == (64, 64) and not any(m.startswith('bksdm') for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
