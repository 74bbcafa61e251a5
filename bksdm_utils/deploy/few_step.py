"""Training of a few-step student, and its images and scores by the number of steps (notebook 06)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image

from ..config.deploy import DemoAndExport
from ..config.training import Training, TrainingData
from ..core.families import TextConditioning
from ..evaluation.metrics import Score, cosines, mean_score
from ..evaluation.networks import MetricClip
from ..evaluation.prompts import read_prompts, storybook_prompts
from ..evaluation.sampling import generate
from ..models.pipelines import Pipeline, own_copy, with_unet
from ..models.saving import save_model
from ..training.job import DTYPES
from ..training.latents import load_data
from ..training.trainer import Trainer
from .consistency import ConsistencyDistillation, IntervalBatches


def prepare_few_step(
    config: DemoAndExport, student: Pipeline, teacher: UNet2DConditionModel, folder: Path
) -> tuple[ConsistencyDistillation, IntervalBatches, Trainer]:
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
