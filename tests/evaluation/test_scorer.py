import json
import subprocess
import sys

import pytest
from PIL import Image

from bksdm_utils.config.surgery import ArchitectureSurgery
from bksdm_utils.config.training import KDTraining
from bksdm_utils.core.surgery import build_student
from bksdm_utils.data.scenes import ATTRIBUTES
from bksdm_utils.evaluation import scorer as module
from bksdm_utils.evaluation.scorer import PROMPTS, Scorer
from bksdm_utils.files import ROOT
from bksdm_utils.models.pipelines import load_pipeline, with_unet

STORYBOOK = ROOT / "data" / "storybook"


def test_other_teachers_sample_fixed_prompts_without_scores():
    for config in (KDTraining.filled(preset="sd-v1.4"), KDTraining.filled(num_images=8, train_data_dir="some/images"),
                   ArchitectureSurgery.filled(preset="sd-v1.4")):  # fmt: skip
        scorer = Scorer(config)
        assert scorer.captions == list(PROMPTS) and scorer.scores([]) == {} and scorer.clip is None
        assert all(value != value for value in scorer.validate(None).values())  # NaN


def test_images_are_sampled_as_the_config_says(monkeypatch):
    config = KDTraining.filled(num_images=3, num_validation_images=2, seed=5, guidance_scale=3.5, scheduler="ddim",
                               num_inference_steps=7, sampling_batch_size=2, batch_size=64)  # fmt: skip
    given = []
    monkeypatch.setattr(module, "generate", lambda pipeline, captions, **sampling: given.append((captions, sampling)))
    monkeypatch.setattr(module, "fid", lambda *_: 1.0)
    monkeypatch.setattr(module, "clip_score", lambda *_: 0.5)
    scorer = Scorer(config)
    monkeypatch.setattr(scorer.clip, "__dict__", {"image_network": lambda images: images})
    scorer.sample(None)
    assert scorer.validate(None) == {"clip_score": 0.5, "fid": 1.0}
    expected = {"seed": 5, "guidance_scale": 3.5, "scheduler": "ddim", "num_inference_steps": 7, "batch_size": 2}
    assert expected.items() <= given[0][1].items() and given[1][1] == given[0][1] | {"num_inference_steps": 10}
    assert len(given[0][0]) == 3 and len(given[1][0]) == 2 and not set(given[0][0]) & set(given[1][0])


@pytest.mark.slow
def test_validation_distinguishes_the_teacher_from_a_cut_student():
    scorer = Scorer(KDTraining.filled(num_images=1, num_validation_images=16))
    pipeline = load_pipeline(scorer.config.teacher)
    teacher = scorer.validate(pipeline)
    cut = scorer.validate(with_unet(pipeline, build_student(pipeline.unet, "bk_small")))
    assert teacher["clip_score"] > cut["clip_score"] + 0.5 and teacher["fid"] < cut["fid"]


def test_the_committed_scores_are_high_enough():
    scores = json.loads((STORYBOOK / "scores.json").read_text())
    assert scores["num_images"] == 256 and scores["psnr"] >= 26
    assert scores["teacher"]["clip_score"] >= 0.9 * scores["real"]["clip_score"]
    needed = {"object": 0.9, "colour": 0.95, "place": 0.98, "relation": 0.75, "drawn_once": 0.9}
    assert all(scores["teacher"][name] >= least for name, least in needed.items())
    assert min(scores["real"][name] for name in ATTRIBUTES) >= 0.97 and scores["real"]["relation"] >= 0.9


def test_the_distance_to_the_teachers_images_is_in_grey_levels():
    scorer = Scorer(KDTraining.filled(num_images=2))
    black, grey = ([Image.new("RGB", (64, 64), colour)] * 2 for colour in ("black", (10, 10, 10)))
    assert scorer.scores(grey, black)["distance"] == 10 and scorer.scores(grey, grey)["distance"] == 0
    assert "distance" not in scorer.scores(grey)


def test_the_committed_teacher_is_small():
    assert sum(path.stat().st_size for path in STORYBOOK.rglob("*") if path.is_file()) <= 40e6


@pytest.mark.slow
def test_the_committed_teacher_loads_without_this_package(tmp_path):
    program = (
        "import sys; from diffusers import StableDiffusionPipeline\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({str(STORYBOOK / 'teacher')!r})\n"
        "image = pipe('a big red cat at night', num_inference_steps=4).images[0]\n"
        "assert image.size == (64, 64) and not any(m.startswith('bksdm') for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
