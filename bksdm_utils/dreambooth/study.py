"""Notebook 05: the same prompts with every model before, during and after training, and the scores of the paper."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from ..config.dreambooth import DreamBoothTraining
from ..config.evaluation import FolderSampling
from ..config.shared import prompts_of
from ..evaluation.folders import folder_of, image_path, sample_folder
from ..evaluation.metrics import Score, mean_score
from ..evaluation.networks import MetricClip, Network
from ..evaluation.prompts import Prompt
from ..evaluation.sampling import generate
from ..files import check_disk, resolve
from ..models.hashes import model_hash
from ..models.pipelines import Pipeline, find_pipeline, load_pipeline, load_unet, sampling_dtype, with_unet
from ..training.preview import save_grid
from .job import DreamBoothRun
from .subjects import Subject, class_prompts, open_images


def load_models(config: DreamBoothTraining, student_folder: Path, variant: str) -> dict[str, Pipeline]:
    """Teacher and student, as `config.models` asks for them, by name; one that does not exist is left out.

    The student is `config.student`, or the U-Net in `student_folder`; `variant` is its name.
    """
    teacher = find_pipeline(config.teacher, config.device, sampling_dtype(config.device))
    models = {"teacher": teacher} if teacher and "teacher" in config.models else {}
    if teacher and "student" in config.models:
        if config.student or student_folder.is_dir():
            models[variant] = with_unet(teacher, load_unet(config.student or student_folder, teacher))
        else:
            print(f"no student in {student_folder}: run notebook 03 first, or name one by `student`")
    return models


class Evaluated(NamedTuple):
    """Images of the subject's prompts and of prompts of its class, with their scores; none without a CLIP model."""

    images: list[Image.Image]
    scores: dict[str, Score]
    class_images: list[Image.Image]
    class_scores: dict[str, Score]


class Study:
    """Samples and scores the same prompts from the same noise with every model, and keeps the results.

    Args:
        subject: None where it could not be loaded; then `models` must be empty.
        folder: of the run; its disk must hold the pipelines of full fine-tuning.

    Attributes:
        evaluated: (model, stage) -> `Evaluated`; the stages are "before", the methods, and others of the notebook.
        along, losses, costs: of every "model, method": steps with scores, (step, loss), and name -> cost.
    """

    def __init__(
        self, config: DreamBoothTraining, subject: Subject | None, models: Mapping[str, Pipeline], folder: Path,
        clip: MetricClip | None = None, dino: Network | None = None,
    ):  # fmt: skip
        self.config, self.subject, self.models, self.clip, self.dino = config, subject, models, clip, dino
        self.sampling = config.part(FolderSampling, batch_size=config.sampling_batch_size)
        self.prompts = subject.prompts(config.identifier, config.num_images) if subject else []
        self.class_prompts = class_prompts(subject, 8) if subject else []
        self.evaluated, self.along, self.losses, self.costs = {}, {}, {}, {}
        if "full" in config.methods and config.keep_models:
            parts = [part for model in models.values() for part in (model.unet, model.text_encoder, model.vae)]
            check_disk(folder, 4 * sum(p.numel() for part in parts for p in part.parameters()), "whole pipelines")

    def sample(self, pipeline: Pipeline, prompts: Sequence[Prompt], name: str) -> list[Image.Image]:
        """One image for each prompt, kept for later runs in a folder by `name` and a hash of model and settings."""
        texts = [p.text for p in (prompts[:8] if name.endswith("-class") else prompts)]  # any number of the class's
        digest, key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:6], model_hash(pipeline)
        label = re.sub(r"[^\w.=+-]+", "_", f"{self.config.preset}-{name}-{digest}")
        folder = folder_of(self.config.images_dir, label, key, self.sampling)
        for _ in sample_folder(pipeline, prompts, folder, self.sampling, key):
            pass
        return [Image.open(image_path(folder, prompt.id)).copy() for prompt in prompts]

    def class_images(self, name: str) -> list[tuple[str, Image.Image]]:
        """(caption, image) of the subject's class, for prior preservation: by this model, another, or of a folder."""
        prompts = class_prompts(self.subject, self.config.num_class_images if self.config.prior_loss_weight else 0)
        if prompts and self.config.class_images_dir:
            images, _ = open_images(Path(resolve(self.config.class_images_dir)))
            return [(prompt.text, image) for prompt, image in zip(prompts, images, strict=False)]
        if prompts and (by := self.config.class_images_by):
            another = load_pipeline(by, self.config.device, sampling_dtype(self.config.device))
            images = self.sample(another, prompts, "another-class")
        else:
            images = self.sample(self.models[name], prompts, f"{name}-class") if prompts else []
        return [(prompt.text, image) for prompt, image in zip(prompts, images, strict=True)]

    def evaluate(self, name: str, stage: str, pipeline: Pipeline) -> dict[str, Score]:
        """Samples and scores a model at a stage; returns the scores of the subject's prompts."""
        images = self.sample(pipeline, self.prompts, f"{name}-{self.subject.name}-{stage}")
        class_images = self.sample(pipeline, self.class_prompts, f"{name}-class")
        class_scores = self._scores(class_images, [prompt.text for prompt in self.class_prompts])
        self.evaluated[name, stage] = Evaluated(images, self._scores(images), class_images, class_scores)
        return self.evaluated[name, stage].scores

    def _scores(self, images: Sequence[Image.Image], texts: Sequence[str] = ()) -> dict[str, Score]:
        texts = texts or self.subject.plain_texts(self.config.num_images)
        return subject_scores(self.clip, self.dino, images, self.subject.images, texts) if self.clip else {}

    @property
    def validation_steps(self) -> list[int]:
        """The steps after which a training in progress is looked at; the last one is evaluated anyway."""
        every, total = self.config.validation_steps, self.config.max_train_steps
        return list(range(every, total, every)) if every else [total // 3, 2 * total // 3]

    def validate(self, name: str, run: DreamBoothRun) -> None:
        """Samples after the present step: prompts of one's own to validation/, the subject's for their scores.

        The scores are added to the run's points, which outlive an interruption.
        """
        if texts := prompts_of(self.config.validation_prompts):
            images = generate(run.pipeline, texts, **self.sampling.values())
            save_grid([images], run.trainer.output_dir / "validation", run.trainer.step)
            return
        images = self.sample(run.pipeline, self.prompts, f"{name}-{self.subject.name}-underway")
        run.points.append(_point(run.trainer.step, self._scores(images)))

    def finish(self, name: str, run: DreamBoothRun) -> None:
        """Evaluates and saves what a run has trained; keeps its curves and costs."""
        method, label = run.model.method, f"{name}, {run.model.method}"
        before, after = self.evaluated[name, "before"].scores, self.evaluate(name, method, run.pipeline)
        self.along[label] = [_point(0, before), *run.points.rows, _point(run.trainer.step, after)]
        rows, size = run.log.rows, run.trainer.training_bytes()
        self.losses[label] = [(row["step"], row["loss_instance"]) for row in rows]
        saved = self.config.keep_models or method == "lora"
        self.costs[label] = {
            "trained parameters": run.model.num_trained,
            "file MB": run.save() / 1e6 if saved else None,
            "gradients and optimizer MB": (size["gradients"] + size["optimizer"]) / 1e6,
            "peak GB": max(row["memory_gb"] for row in rows),
            "seconds": sum(row["seconds"] for row in rows),
            "loss": np.mean([row["loss_instance"] for row in rows[-20:]]),
        }
        print(f"{label}: {', '.join(f'{score} {value}' for score, value in after.items())}", flush=True)

    def scores(self) -> dict[str, dict[str, Score]]:
        """ "model, stage" -> the scores of the subject's prompts; empty without a CLIP model."""
        return {f"{name}, {stage}": some.scores for (name, stage), some in self.evaluated.items() if some.scores}

    def drift(self, name: str | None) -> dict[str, dict[str, Score]]:
        """Stage -> scores of a model's images, those of its class beside the subject's."""
        return {stage: {**{f"{score} of the class": value for score, value in some.class_scores.items()}, **some.scores}
                for (model, stage), some in self.evaluated.items() if model == name and some.scores}  # fmt: skip

    def key_figure(self) -> str:
        """The gain in CLIP-I of every training, in a line."""
        points = {label: [point["clip_i"] for point in rows] for label, rows in self.along.items() if self.clip}
        gains = [f"{label} {values[0]:.2f} to {values[-1]:.2f}" for label, values in points.items()]
        return f"{self.config.subject}: CLIP-I {'; '.join(gains)}" if gains else "no scores: see what was skipped"

    def metrics(self) -> dict[str, object]:
        """Everything that result.json keeps."""
        return {
            "subject": self.subject.name if self.subject else self.config.subject, "costs": self.costs,
            "subject_images": len(self.subject.images) if self.subject else 0,
            "skipped": self.subject.skipped if self.subject else [],
            "identifier": self.config.identifier, "num_images": len(self.prompts), "scores": self.scores(),
            "steps": self.config.max_train_steps, "along": self.along, "sampling": self.sampling.values(),
            "drift": self.drift(list(self.models)[-1] if self.models else None),
            "networks": [network.key for network in (self.clip, self.dino) if network],
        }  # fmt: skip


@torch.no_grad()
def subject_scores(
    clip: MetricClip, dino: Network | None, images: Sequence[Image.Image], real: Sequence[Image.Image],
    texts: Sequence[str],
) -> dict[str, Score]:  # fmt: skip
    """The scores of the DreamBooth paper (section 4.2), with standard errors over the sampled images.

    Args:
        dino: DINO's ViT-S/16; None leaves its score out.
        real: the subject's images.
        texts: the prompt of each sampled image, without the identifier.

    Returns:
        clip_i, dino: mean cosine between sampled and real images; clip_t: between sampled images and their texts.
    """
    embeddings = clip.images(images)
    scores = {"clip_i": mean_score((embeddings @ clip.images(real).T).mean(1).cpu())}
    if dino is not None:
        sampled_rows, real_rows = (F.normalize(dino(list(some)), dim=-1) for some in (images, real))
        scores["dino"] = mean_score((sampled_rows @ real_rows.T).mean(1).cpu())
    return scores | {"clip_t": mean_score((embeddings * clip.texts(list(texts))).sum(-1).cpu())}


def score_table(scores: Mapping[str, Mapping[str, Score]]) -> pd.DataFrame:
    """One row for each entry, its scores with their standard errors."""
    return pd.DataFrame({name: {score: str(value) for score, value in some.items()} for name, some in scores.items()}).T


def mean_table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Subjects and their scores, and a last row with the means over subjects and their standard errors.

    Args:
        rows: "subject" -> name, and score -> (value, error).
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "subject"))
    lines = [{"subject": row["subject"], **{n: str(Score(*row[n])) for n in names if n in row}} for row in rows]
    means = {name: str(mean_score([row[name][0] for row in rows if name in row])) for name in names}
    return pd.DataFrame([*lines, {"subject": "mean", **means}])


def _point(step: int, scores: Mapping[str, Score]) -> dict[str, float]:
    return {"step": step, **{name: score.value for name, score in scores.items()}}
