"""Training of a few-step student, and its images and scores by the number of steps (notebook 06)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from ..training.batches import KDBatches
from ..training.job import DTYPES
from ..training.latents import load_data
from ..training.trainer import Trainer
from .consistency import ConsistencyDistillation


@dataclass
class FewStepRun:
    """A student that is trained to need few steps; `trainer.steps(distillation.losses, batches)` is the loop."""

    student: Pipeline
    distillation: ConsistencyDistillation
    batches: KDBatches
    trainer: Trainer

    def finish(self, folder: Path) -> Pipeline:
        """The averaged student with the scheduler it was trained for, saved as a pipeline."""
        with self.trainer.ema_weights() as averaged:
            few = with_unet(self.student, copy.deepcopy(averaged).to(self.student.unet.dtype))
        few.scheduler = self.distillation.scheduler
        save_model(few, folder)
        return few


def prepare_few_step(
    config: DemoAndExport, student: Pipeline, teacher: UNet2DConditionModel, folder: Path
) -> FewStepRun:
    """Loads the data and sets up distillation by the teacher's U-Net with the student's text encoder, and the trainer.

    Raises:
        ValueError: few_steps exceed lcm_intervals.
    """
    if max(config.few_steps, default=1) > config.lcm_intervals:
        raise ValueError(f"few_steps is {config.few_steps}: expected at most lcm_intervals, {config.lcm_intervals}")
    precision = preset_value(config, "mixed_precision") if student.device.type == "cuda" else "no"
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
    return FewStepRun(student, distillation, distillation.batches(data), trainer)


def preset_value(config: DemoAndExport, name: str, kind: str = "DemoAndExport") -> object:
    """A value of the preset that is no parameter of notebook 06; None where it has none."""
    return config.chosen_preset.values_for(kind).get(name)


def scored_captions(config: DemoAndExport) -> list[str]:
    """The captions that are scored: the evaluation's where the preset has a file of them, else storybook's."""
    path = preset_value(config, "prompts", "CocoEvaluation")
    prompts = read_prompts(path, config.num_images) if path else storybook_prompts(config.num_images)
    return [prompt.text for prompt in prompts]


@dataclass
class StepComparison:
    """A student and its few-step version, compared by the number of steps.

    Attributes:
        names: of the student with DPM-Solver++, and of the few-step student.
        images: of the first caption, by row name.
        scores: (name, steps) -> CLIP score; empty without a CLIP model.
        reference: CLIP score of the student in all its steps.
    """

    config: DemoAndExport
    names: tuple[str, str]
    images: dict[str, list[Image.Image]] = field(default_factory=dict)
    scores: dict[tuple[str, int], Score] = field(default_factory=dict)
    reference: Score | None = None

    @property
    def passes(self) -> int:
        """U-Net passes of the student in each step; guidance takes two."""
        return 1 + (self.config.guidance_scale > 1)

    def lines(self) -> dict[str, list[tuple[int, float]]]:
        """Points (passes, CLIP score) of both, and of the student in all its steps as a level line."""
        counts, (plain, few) = self.config.few_steps, self.names
        lines = {plain: [(n * self.passes, self.scores[plain, n].value) for n in counts],
                 few: [(n, self.scores[few, n].value) for n in counts]}  # fmt: skip
        ends = (min(counts), max(counts) * self.passes)
        return lines | {f"{self.config.num_inference_steps} steps": [(n, self.reference.value) for n in ends]}

    def rows(self) -> list[dict[str, object]]:
        """The same as rows of a table."""
        plain, few = self.names
        return [{"steps": n, plain: str(self.scores[plain, n]), "passes": n * self.passes,
                 few: str(self.scores[few, n]), "passes ": n} for n in self.config.few_steps]  # fmt: skip


def compare_steps(
    config: DemoAndExport, student: Pipeline, few: Pipeline, captions: Sequence[str], clip: MetricClip | None, name: str
) -> StepComparison:
    """Samples the captions with both for each number of `config.few_steps`, and with the student in all its steps."""
    result = StepComparison(config, (f"{name}, DPM-Solver++", f"{name}, few-step"))
    common = {"seed": config.seed, "batch_size": preset_value(config, "sampling_batch_size")}

    def score(images: Sequence[Image.Image]) -> Score | None:
        return mean_score(cosines(clip.images(images), clip.texts(captions)).cpu()) if clip else None

    settings = {"scheduler": "dpm++", "guidance_scale": config.guidance_scale}, {"guidance_scale": 1.0}
    for steps in config.few_steps:
        for row, model, own in zip(result.names, (student, few), settings, strict=True):
            images = generate(model, captions, num_inference_steps=steps, **own, **common)
            result.images.setdefault(row, []).append(images[0])
            if clip:
                result.scores[row, steps] = score(images)
    whole = generate(student, captions, num_inference_steps=config.num_inference_steps,
                     guidance_scale=config.guidance_scale, **common)  # fmt: skip
    result.images[f"{name}, {config.num_inference_steps} steps"] = [whole[0]] * len(config.few_steps)
    result.reference = score(whole)
    return result
