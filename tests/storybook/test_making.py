import json
import random
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.storybook import making
from bksdm_utils.storybook.networks import SCHEDULE, contrast, degraded, hard_negatives, new_tokenizer, unet_loss
from bksdm_utils.storybook.recipes import RECIPE


def test_hard_negatives_are_false_and_near():
    rng = random.Random(0)
    for scene in map(sample_scene, range(100)):
        words = scene.caption.split()
        for negative in hard_negatives(scene, rng):
            other = negative.caption.split()
            assert other != words
            swapped = sorted(other) == sorted(words)
            assert swapped or len(set(words) ^ set(other)) <= 5  # "by day", "on the sea"


def test_a_text_equal_to_another_caption_is_no_negative():
    output = type("Output", (), {"logits_per_image": torch.tensor([[5.0, 9.0, 0.0], [1.0, 7.0, 0.0]])})
    loss = contrast(output, torch.tensor([0, 0, 1]))
    assert loss["accuracy"] == 1.0  # text 1 outscores text 0 for image 0, but both say the same


def test_the_tokenizer_writes_any_text():
    tokenizer = new_tokenizer([sample_scene(i).caption for i in range(200)])
    caption = "a big red cat at night"
    assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
    assert tokenizer.unk_token_id not in tokenizer("zebra ☃ 123").input_ids[1:-1]


def test_a_third_of_a_clips_images_is_rendered_decoded_and_blurred():
    images, decoded = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.full((3, 3, 8, 8), 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    rendered, through_vae, blurred = degraded(images, decoded, torch.tensor([0.1, 0.5, 0.9]))
    assert rendered.equal(images[0].float()) and through_vae.equal(decoded[1].float())
    assert 0 < blurred[0, 4, 4] < 255 and blurred[0, 4, 5] > 0 and blurred.mean() == pytest.approx(255 / 64)


@pytest.mark.slow
def test_making_runs_every_stage_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "score", lambda *_, **__: None)
    recipe, made, kept = RECIPE, tmp_path / "made", tmp_path / "kept"
    small = {stage: config.but(batch_size=2) for stage, config in recipe.configs.items()}
    for stage in small:
        for steps in (20, 40):
            making.make([stage], made, kept, steps, num_scenes=16, recipe=replace(recipe, configs=small))
        assert (made / stage / "log.csv").read_text().count("\n") == 3
    making.make(["export"], made, kept, recipe=recipe)
    pipeline = load_pipeline(kept / "teacher")
    assert pipeline("a cat", num_inference_steps=4).images[0].size == (recipe.world.size, recipe.world.size)
    assert list(pipeline.unet.config.block_out_channels) == [32, 64, 64]
    index = json.loads((tmp_path / "kept" / "teacher" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vea: expected vae, text"):
        making.make(["vae", "vea"], tmp_path, tmp_path)


def test_unet_loss_is_the_min_snr_weighted_error():
    scheduler, latents = DDPMScheduler(**SCHEDULE), torch.randn(3, 4, 2, 2)
    noise, uniform = torch.randn_like(latents), torch.tensor([0.0, 0.3, 0.99])

    class Zero(torch.nn.Module):
        def forward(self, noisy, timesteps, hidden_states):
            self.timesteps = timesteps
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    model = Zero()
    losses = unet_loss(model, latents, noise, uniform, torch.zeros(3), scheduler)
    snr = scheduler.alphas_cumprod[model.timesteps] / (1 - scheduler.alphas_cumprod[model.timesteps])
    errors = noise.square().mean((1, 2, 3))
    assert losses["mse"].item() == pytest.approx(errors.mean().item())
    assert losses["loss"].item() == pytest.approx((snr.clamp(max=5) / snr * errors).mean().item(), rel=1e-4)
