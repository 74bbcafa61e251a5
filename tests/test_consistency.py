"""Latent consistency distillation: the solver's step, the consistency function, and that a student learns."""

import numpy as np
import pytest
import torch
from conftest import MemoryData
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler

from bksdm_utils.config.training import TrainingConfig
from bksdm_utils.core.families import TextConditioning
from bksdm_utils.core.surgery import build_student
from bksdm_utils.deploy.consistency import ConsistencyDistillation, clean_latents
from bksdm_utils.evaluation.sampling import generate
from bksdm_utils.models.pipelines import load_pipeline, with_unet
from bksdm_utils.training.rng import BatchRng
from bksdm_utils.training.trainer import Trainer

SHAPE = (6, 1, 4, 8, 8)


@pytest.fixture
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


def distillation(pipeline, prediction_type="epsilon", num_intervals=10, guidance_scale=1.0):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (6, 20), generator=generator)
    data = MemoryData(torch.randn(SHAPE, generator=generator), torch.full(SHAPE, 0.1), ids, ids[:1])
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    condition = TextConditioning(pipeline)
    return ConsistencyDistillation(pipeline.unet, condition, schedule, data, guidance_scale, num_intervals)


def noisy_example():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([999, 499, 99])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_solvers_step_is_ddim_with_guidance(pipeline, prediction_type):
    ours = distillation(pipeline, prediction_type, guidance_scale=3.0)
    (noisy, timesteps), ids = noisy_example(), ours.data.token_ids[:3]
    told, empty = ours.condition(ids), ours.condition(ours.data.empty_ids.expand(3, -1))
    ddim = DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing",
        set_alpha_to_one=False,
    )  # fmt: skip
    ddim.set_timesteps(10)
    with torch.no_grad():
        solved = ours.solve(noisy, timesteps, timesteps - 100, told)
        free, conditional = (pipeline.unet(noisy, timesteps, **c).sample for c in (empty, told))
        guided = free + 3.0 * (conditional - free)
        for i, t in enumerate(timesteps[:2]):
            expected = ddim.step(guided[i : i + 1], int(t), noisy[i : i + 1]).prev_sample
            assert torch.allclose(solved[i : i + 1], expected, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_consistency_function_is_what_lcm_sampling_uses(pipeline, prediction_type):
    ours = distillation(pipeline, prediction_type)
    noisy, timesteps = noisy_example()
    condition = ours.condition(ours.data.token_ids[:3])
    lcm = LCMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type,
                                   original_inference_steps=10)  # fmt: skip
    lcm.set_timesteps(10)
    with torch.no_grad():
        answer = ours.answer(pipeline.unet, noisy, timesteps, condition)
        prediction = pipeline.unet(noisy, timesteps, **condition).sample
        for i, t in enumerate(timesteps):
            lcm._step_index = None
            assert torch.allclose(answer[i], lcm.step(prediction[i], t, noisy[i]).denoised, atol=1e-4)
        at_the_end = ours.answer(pipeline.unet, noisy, torch.zeros(3, dtype=torch.long), condition)
    assert torch.equal(at_the_end, noisy)  # the picture itself is its own answer


def test_clean_latents_undo_the_noise(pipeline):
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    latents, timesteps = noisy_example()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    noisy = schedule.add_noise(latents, noise, timesteps)
    assert torch.allclose(clean_latents(schedule, noise, noisy, timesteps), latents, atol=1e-3)


def test_a_student_learns_to_agree_with_itself_and_draws_in_two_steps(pipeline, tmp_path):
    student = build_student(pipeline.unet, "bk_tiny")
    ours = distillation(pipeline, guidance_scale=2.0)
    before = {name: p.clone() for name, p in pipeline.unet.named_parameters()}
    trainer = Trainer(student, TrainingConfig(30, 6, learning_rate=3e-3, seed=0, ema_decay=0.9), tmp_path)
    losses = [step.floats()["loss"] for step in trainer.steps(ours.losses, 6)]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    assert all(torch.equal(p, before[name]) for name, p in pipeline.unet.named_parameters())
    own = with_unet(pipeline, student)
    own.scheduler = ours.scheduler
    first, again = (generate(own, ["a big red cat"] * 2, num_inference_steps=2, guidance_scale=1.0) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(*first)  # each from its own noise


def test_every_example_of_a_batch_has_its_own_interval(pipeline):
    ours = distillation(pipeline, num_intervals=1)
    seen = []
    ours.answer = lambda student, noisy, timesteps, condition: seen.append(timesteps.tolist()) or noisy
    ours.losses(pipeline.unet, BatchRng(0, 0, range(4), 4, 6))
    assert seen == [[0] * 4, [999] * 4]  # a single interval reaches from noise to picture
    with pytest.raises(ValueError, match="num_intervals"):
        distillation(pipeline, num_intervals=0)
