"""Few-step students: latent consistency distillation (LCM, arXiv 2310.04378) of a finished student (notebook 06).

A diffusion model predicts the next small step from noise to image; a consistency model predicts the end of the path
from any point of it. It is trained to agree with itself at two neighbouring points of a path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from ..core.losses import Batch, LossWeights, clean_latents, kd_losses
from ..training.batches import KDBatches
from ..training.rng import BatchRng


@dataclass
class IntervalBatches(KDBatches):
    """Batches whose timesteps are the noisy ends of intervals of the schedule, chosen at random.

    Args:
        num_train_timesteps: the number of intervals.
        width: timesteps in each of them.
    """

    width: int = 1

    def __call__(self, rng: BatchRng) -> Batch:
        batch = super().__call__(rng)
        return replace(batch, timesteps=(batch.timesteps + 1) * self.width - 1)


class ConsistencyDistillation:
    """The student's answer at t is trained to equal its answer one DDIM step of the solver nearer to the image.

    The step is guided, so that guidance moves into the student, which then samples with one pass a step. The target is
    the student itself without gradient (as in arXiv 2310.14189), where LCM keeps a running average of it.

    Args:
        solver: the frozen U-Net whose paths are followed: the teacher, or the finished student.
        conditioning: token ids -> kwargs of the U-Nets, as `TextConditioning`.
        scheduler: the solver's DDPM noise schedule.
        empty_ids: (1, T) or (1, 2, T), token ids of the empty prompt.
        guidance_scale: of the solver.
        num_intervals: the schedule is divided into this many steps of the solver.
    """

    def __init__(
        self, solver: UNet2DConditionModel, conditioning: Callable[[torch.Tensor], dict], scheduler: DDPMScheduler,
        empty_ids: torch.Tensor, guidance_scale: float, num_intervals: int = 50,
    ):  # fmt: skip
        steps = scheduler.config.num_train_timesteps
        self.width = steps // num_intervals
        if not self.width:
            raise ValueError(f"lcm_intervals is {num_intervals}: expected at most {steps}")
        self.solver = solver.requires_grad_(False).eval()
        self.conditioning, self.empty_ids, self.guidance_scale = conditioning, empty_ids, guidance_scale
        self.scheduler = LCMScheduler.from_config(scheduler.config, original_inference_steps=num_intervals)

    def batches(self, data) -> IntervalBatches:
        """The batches that `losses` takes, of a data set as `load_data` gives it."""
        intervals = self.scheduler.config.original_inference_steps
        return IntervalBatches(data, intervals, self.solver.device, width=self.width)

    def losses(self, student: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Mean squared difference of the two answers, each example weighted by its signal-to-noise ratio, at most 1."""
        nearer = (batch.timesteps - self.width).clamp(min=0)
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        condition = self.conditioning(batch.token_ids)
        with torch.no_grad():
            target = self.answer(student, self.solve(noisy, batch.timesteps, nearer, condition), nearer, condition)
        answer = self.answer(student, noisy, batch.timesteps, condition)
        weights = compute_snr(self.scheduler, batch.timesteps).clamp(max=1)
        return {"loss": kd_losses(answer, target, target, {}, LossWeights(1.0, 0.0, 0.0), weights).total}

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
            empty_ids = self.empty_ids.to(noisy.device)
            empty = self.conditioning(empty_ids.expand(len(noisy), *empty_ids.shape[1:]))
            unguided = self.solver(noisy, timesteps, **empty).sample.float()
            prediction = unguided + self.guidance_scale * (prediction - unguided)
        clean = clean_latents(self.scheduler, prediction, noisy, timesteps)
        alphas_cumprod = self.scheduler.alphas_cumprod.to(noisy.device)
        before, after = (alphas_cumprod[t].view(-1, 1, 1, 1) for t in (timesteps, nearer))
        noise = (noisy - before.sqrt() * clean) / (1 - before).sqrt()
        return after.sqrt() * clean + (1 - after).sqrt() * noise
