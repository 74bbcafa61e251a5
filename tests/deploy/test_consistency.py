"""Latent consistency distillation: solver step, consistency function, intervals, and training (notebook 06)."""

import numpy as np
import pytest
import torch
from conftest import MemoryData
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler

from bksdm_utils.config.training import Training
from bksdm_utils.core.families import TextConditioning
from bksdm_utils.core.surgery import build_student
from bksdm_utils.deploy.few_step import ConsistencyDistillation
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
    conditioning = TextConditioning(pipeline)
    args = (pipeline.unet, conditioning, schedule, data.empty_ids, guidance_scale, num_intervals)
    return ConsistencyDistillation(*args), data


def noisy_example():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([999, 499, 99])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_solver_step_is_guided_ddim(pipeline, prediction_type):
    ours, data = distillation(pipeline, prediction_type, guidance_scale=3.0)
    noisy, timesteps = noisy_example()
    prompt, empty = ours.conditioning(data.token_ids[:3]), ours.conditioning(data.empty_ids.expand(3, -1))
    ddim = DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing",
        set_alpha_to_one=False,
    )  # fmt: skip
    ddim.set_timesteps(10)
    with torch.no_grad():
        solved = ours.solve(noisy, timesteps, timesteps - 100, prompt)
        unguided, conditional = (pipeline.unet(noisy, timesteps, **c).sample for c in (empty, prompt))
        guided = unguided + 3.0 * (conditional - unguided)
        for i, t in enumerate(timesteps[:2]):
            expected = ddim.step(guided[i : i + 1], int(t), noisy[i : i + 1]).prev_sample
            assert torch.allclose(solved[i : i + 1], expected, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistency_function_is_that_of_lcm_sampling(pipeline, prediction_type):
    ours, data = distillation(pipeline, prediction_type)
    noisy, timesteps = noisy_example()
    condition = ours.conditioning(data.token_ids[:3])
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
    assert torch.equal(at_the_end, noisy)  # without noise the answer is the input


@pytest.mark.slow
def test_student_learns_and_samples_in_two_steps(pipeline, tmp_path):
    student = build_student(pipeline.unet, "bk_tiny")
    ours, data = distillation(pipeline, guidance_scale=2.0)
    before = {name: p.clone() for name, p in pipeline.unet.named_parameters()}
    config = Training(max_train_steps=30, batch_size=6, learning_rate=3e-3, ema_decay=0.9)
    trainer = Trainer(student, config, tmp_path)
    losses = [step.floats()["loss"] for step in trainer.steps(ours.losses, ours.batches(data))]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    assert all(torch.equal(p, before[name]) for name, p in pipeline.unet.named_parameters())
    own = with_unet(pipeline, student)
    own.scheduler = ours.scheduler
    first, again = (generate(own, ["a big red cat"] * 2, num_inference_steps=2, guidance_scale=1.0) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(*first)  # each from its own noise


def test_timesteps_end_intervals_and_the_target_is_one_interval_nearer(pipeline):
    for intervals, expected in ((10, set(range(99, 1000, 100))), (1, {999})):
        (ours, data), seen = distillation(pipeline, num_intervals=intervals), []
        ours.answer = lambda student, noisy, timesteps, condition, seen=seen: seen.append(timesteps) or noisy
        for step in range(20):
            ours.losses(pipeline.unet, ours.batches(data)(BatchRng(0, step, range(4), 4, 6)))
        nearer, noisier = torch.cat(seen[::2]), torch.cat(seen[1::2])
        assert set(noisier.tolist()) == expected
        assert torch.equal(nearer, (noisier - 1000 // intervals).clamp(min=0))  # one interval may reach to the image
    with pytest.raises(ValueError, match="lcm_intervals is 1001: expected at most 1000"):
        distillation(pipeline, num_intervals=1001)
