"""Few-step students: latent consistency distillation (LCM, arXiv 2310.04378) on top of a finished student (notebook 06).

A diffusion model predicts the next small step from noise to image; a consistency model jumps to the end from anywhere
on the path. It is trained to agree with itself: its prediction at one point of a path and at the next solver step.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from ..core.losses import LossWeights, kd_losses
from ..training.latents import LatentDataset
from ..training.rng import BatchRng
from ..training.streams import StreamedDataset


def clean_latents(scheduler, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x₀ that a prediction of ε or v at `timesteps` (B,) stands for, (B, 4, H, W)."""
    alphas_cumprod = scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
    signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return signal * noisy - noise * prediction
    return (noisy - noise * prediction) / signal


class ConsistencyDistillation:
    """The student at t agrees with itself one DDIM step nearer to the picture; `losses` is the engine's.

    The step is the solver network's, with classifier-free guidance, which so moves into the student: it draws with one
    pass a step. Where LCM keeps a running average of the student as target, the student itself is taken, without
    gradient (as in arXiv 2310.14189).

    Args:
        solver: the U-Net whose paths are followed: the teacher, or the finished student; frozen.
        condition: `TextCondition` of the pipeline.
        scheduler: its DDPM noise schedule.
        guidance_scale: of the solver.
        num_intervals: into so many steps the schedule is divided.
    """

    def __init__(
        self, solver: UNet2DConditionModel, condition, scheduler: DDPMScheduler, data: LatentDataset | StreamedDataset,
        guidance_scale: float, num_intervals: int = 50,
    ):  # fmt: skip
        if not 1 <= num_intervals <= scheduler.config.num_train_timesteps:
            raise ValueError(f"num_intervals is {num_intervals}: expected 1 to {scheduler.config.num_train_timesteps}")
        self.solver = solver.requires_grad_(False).eval()
        self.condition, self.data, self.guidance_scale = condition, data, guidance_scale
        self.scheduler = LCMScheduler.from_config(scheduler.config, original_inference_steps=num_intervals)

    def losses(self, student: nn.Module, draw: BatchRng) -> dict[str, torch.Tensor]:
        """One micro-batch: loss, the mean squared difference of the two answers.

        Answers from far away differ most and are worth least: they count by their signal-to-noise ratio, up to 1.
        """
        latents, token_ids = self.data.batch(draw, self.solver.device)
        noise = draw.normal(*latents.shape[1:]).to(latents)
        steps = self.scheduler.config.original_inference_steps
        width = self.scheduler.config.num_train_timesteps // steps
        timesteps = ((draw.integers(steps) + 1) * width - 1).to(latents.device)
        nearer = (timesteps - width).clamp(min=0)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        condition = self.condition(token_ids)
        with torch.no_grad():
            target = self.answer(student, self.solve(noisy, timesteps, nearer, condition), nearer, condition)
        answer = self.answer(student, noisy, timesteps, condition)
        trust = compute_snr(self.scheduler, timesteps).clamp(max=1)
        return {"loss": kd_losses(answer, target, target, {}, LossWeights(1.0, 0.0, 0.0), trust).total}

    def answer(self, student: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> torch.Tensor:
        """The consistency function f(x, t) = c_skip x + c_out x₀(x, t), which is x itself at t = 0; (B, 4, H, W)."""
        prediction = student(noisy, timesteps, **condition).sample.float()
        skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(timesteps.view(-1, 1, 1, 1))
        return skip * noisy + out * clean_latents(self.scheduler, prediction, noisy, timesteps)

    def solve(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, nearer: torch.Tensor, condition: dict
    ) -> torch.Tensor:
        """One DDIM step of the guided solver from `timesteps` to `nearer`, (B, 4, H, W)."""
        prediction = self.solver(noisy, timesteps, **condition).sample.float()
        if self.guidance_scale > 1:
            empty_ids = self.data.empty_ids.to(noisy.device)
            empty = self.condition(empty_ids.expand(len(noisy), *empty_ids.shape[1:]))
            free = self.solver(noisy, timesteps, **empty).sample.float()
            prediction = free + self.guidance_scale * (prediction - free)
        clean = clean_latents(self.scheduler, prediction, noisy, timesteps)
        alphas_cumprod = self.scheduler.alphas_cumprod.to(noisy.device)
        before, after = (alphas_cumprod[t].view(-1, 1, 1, 1) for t in (timesteps, nearer))
        noise = (noisy - before.sqrt() * clean) / (1 - before).sqrt()
        return after.sqrt() * clean + (1 - after).sqrt() * noise
