"""Few-step students: latent consistency distillation (LCM, arXiv 2310.04378) of a finished student (notebook 06).

A diffusion model predicts the next small step from noise to image; a consistency model predicts the end of the path
from any point of it. It is trained to agree with itself at two neighbouring points of a path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import nn

from ..config.deploy import DemoAndExport
from ..config.training import Training, TrainingData
from ..core.families import TextConditioning
from ..core.losses import Batch, LossWeights, clean_latents, kd_losses
from ..evaluation.metrics import Score, cosines, mean_score
from ..evaluation.networks import MetricClip
from ..evaluation.prompts import read_prompts, storybook_prompts
from ..evaluation.sampling import generate
from ..models.devices import DTYPES
from ..models.pipelines import Pipeline, own_copy, with_unet
from ..models.saving import save_model
from ..training.batches import KDBatches
from ..training.latents import load_data
from ..training.trainer import Trainer


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

    def batches(self, data) -> KDBatches:
        """The batches that `losses` takes, of a data set as `load_data` gives it: numbers of intervals as timesteps."""
        return KDBatches(data, self.scheduler.config.original_inference_steps, self.solver.device)

    def losses(self, student: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Mean squared difference of the two answers, each example weighted by its signal-to-noise ratio, at most 1."""
        timesteps = (batch.timesteps + 1) * self.width - 1  # the noisy ends of the batch's intervals
        nearer = (timesteps - self.width).clamp(min=0)
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, timesteps)
        condition = self.conditioning(batch.token_ids)
        with torch.no_grad():
            target = self.answer(student, self.solve(noisy, timesteps, nearer, condition), nearer, condition)
        answer = self.answer(student, noisy, timesteps, condition)
        weights = compute_snr(self.scheduler, timesteps).clamp(max=1)
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


def prepare_few_step(
    config: DemoAndExport, student: Pipeline, teacher: UNet2DConditionModel, folder: Path
) -> tuple[ConsistencyDistillation, KDBatches, Trainer]:
    """What `trainer.steps(distillation.losses, batches)` needs: the teacher's U-Net guides a copy of the student's.

    Raises:
        ValueError: few_steps exceed lcm_intervals.
    """
    if max(config.few_steps, default=1) > config.lcm_intervals:
        raise ValueError(f"few_steps is {config.few_steps}: expected at most lcm_intervals, {config.lcm_intervals}")
    precision = config.chosen_preset.common["mixed_precision"] if student.device.type == "cuda" else "no"
    data = load_data(config.part(TrainingData), student, config.seed)
    solver = own_copy(with_unet(student, teacher))
    for part in (solver.unet, solver.text_encoder):
        part.to(DTYPES[precision])
    schedule = DDPMScheduler.from_config(student.scheduler.config)
    conditioning = TextConditioning(solver, config.resolution)
    distillation = ConsistencyDistillation(solver.unet, conditioning, schedule, data.empty_ids, config.guidance_scale,
                                           config.lcm_intervals)  # fmt: skip
    training = config.part(Training, max_train_steps=config.lcm_steps, lr_schedule="cosine", lr_warmup_steps=10,
                           ema_decay=0.95, mixed_precision=precision)  # fmt: skip
    trainer = Trainer(copy.deepcopy(student.unet).float(), training, folder)
    return distillation, distillation.batches(data), trainer


def save_few_step(student: Pipeline, distillation: ConsistencyDistillation, trainer: Trainer, folder: Path) -> Pipeline:
    """The averaged student with the scheduler it was trained for, also saved as a pipeline."""
    with trainer.ema_weights() as averaged:
        few = with_unet(student, copy.deepcopy(averaged).to(student.unet.dtype))
    few.scheduler = distillation.scheduler
    save_model(few, folder)
    return few


def scored_captions(config: DemoAndExport) -> list[str]:
    """The captions that are scored: of the evaluation's file where the preset has one, else storybook's."""
    path = config.chosen_preset.values_for("CocoEvaluation").get("prompts")
    prompts = read_prompts(path, config.num_images) if path else storybook_prompts(config.num_images)
    return [prompt.text for prompt in prompts]


def compare_steps(
    config: DemoAndExport, student: Pipeline, few: Pipeline, captions: Sequence[str], clip: MetricClip | None
) -> tuple[dict[str, list[Image.Image]], dict[str, dict[int, Score]], Score | None]:
    """Samples the captions with the student (by DPM-Solver++) and the few-step student, for each of `few_steps`.

    Returns:
        images of the first caption by model, "all steps" being the student's own; CLIP scores by model and number of
        steps; that of the student in all its steps.
    """

    def sample(pipeline: Pipeline, steps: int, **kwargs) -> tuple[Image.Image, Score | None]:
        kwargs |= {"seed": config.seed, "batch_size": config.chosen_preset.common["sampling_batch_size"]}
        images = generate(pipeline, captions, num_inference_steps=steps, **kwargs)
        return images[0], mean_score(cosines(clip.images(images), clip.texts(captions)).cpu()) if clip else None

    guidance = {"guidance_scale": config.guidance_scale}
    models = {"DPM-Solver++": (student, {"scheduler": "dpm++", **guidance}), "few-step": (few, {"guidance_scale": 1.0})}
    results = {name: {steps: sample(pipeline, steps, **kwargs) for steps in config.few_steps}
               for name, (pipeline, kwargs) in models.items()}  # fmt: skip
    images = {name: [image for image, _ in row.values()] for name, row in results.items()}
    scores = {name: {steps: score for steps, (_, score) in row.items() if clip} for name, row in results.items()}
    image, reference = sample(student, config.num_inference_steps, **guidance)
    return images | {"all steps": [image] * len(config.few_steps)}, scores, reference
