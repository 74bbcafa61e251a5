import json
import random
from dataclasses import replace

import pytest
import torch

from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.storybook.making import CONFIGS, STAGES, export
from bksdm_utils.storybook.networks import clip_loss, hard_negatives, min_snr_weight, new_tokenizer


def test_hard_negatives_are_false_and_near():
    rng = random.Random(0)
    for scene in map(sample_scene, range(100)):
        words = scene.caption.split()
        for negative in hard_negatives(scene, rng):
            other = negative.caption.split()
            assert other != words
            swapped = sorted(other) == sorted(words)
            assert swapped or len(set(words) ^ set(other)) <= 5  # "by day", "on the sea"


def test_a_text_equal_to_anothers_caption_is_no_negative_to_it():
    class Fixed(torch.nn.Module):
        def forward(self, input_ids, pixel_values):
            return type("Output", (), {"logits_per_image": torch.tensor([[5.0, 9.0, 0.0], [1.0, 7.0, 0.0]])})

    loss = clip_loss(Fixed(), torch.zeros(2), torch.zeros(3), torch.tensor([0, 0, 1]))
    assert loss["accuracy"] == 1.0  # text 1 outscores text 0 for picture 0, but both say the same


def test_min_snr_weight_is_that_of_the_paper():
    alphas_cumprod = torch.tensor([0.99, 0.5, 0.01])
    expected = [min(snr, 5) / snr for snr in (99.0, 1.0, 0.01 / 0.99)]
    assert min_snr_weight(alphas_cumprod, torch.arange(3)).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_tokenizer_writes_any_text():
    tokenizer = new_tokenizer([sample_scene(i).caption for i in range(200)])
    caption = "a big red cat at night"
    assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
    assert tokenizer.unk_token_id not in tokenizer("zebra ☃ 123").input_ids[1:-1]


def test_the_whole_making_runs_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("bksdm_utils.storybook.making.score", lambda *_, **__: None)
    made = tmp_path / "made"
    for stage, train in STAGES.items():
        config = replace(CONFIGS[stage], batch_size=2)
        train(made, replace(config, max_train_steps=20), num_scenes=16)
        train(made, replace(config, max_train_steps=40), num_scenes=16)
        assert (made / stage / "log.csv").read_text().count("\n") == 3
    export(made, tmp_path / "kept")
    pipeline = load_pipeline(tmp_path / "kept" / "teacher")
    assert pipeline("a cat", num_inference_steps=4).images[0].size == (64, 64)
    index = json.loads((tmp_path / "kept" / "teacher" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
