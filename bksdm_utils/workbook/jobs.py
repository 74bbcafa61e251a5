"""Jobs that outlive a notebook, wired together: training with its validation, sampling in processes."""

from __future__ import annotations

from pathlib import Path

from ..config.dreambooth import DreamBoothTraining
from ..config.evaluation import SampleFolder
from ..config.training import KDTraining
from ..data.rendering import SUBJECTS
from ..dreambooth.subjects import load_subject
from ..evaluation.folders import sample
from ..evaluation.prompts import Prompt
from ..evaluation.scorer import Scorer
from ..files import is_main_process
from ..processes import LAST_WORDS, mark_finished
from ..training.job import KDJob, prepare, train


def prepare_training(config: KDTraining, folder: Path) -> tuple[KDJob, Scorer]:
    """A distillation run and the scorer that validates it."""
    scorer = Scorer(config, config.device)
    return prepare(config, folder, config.device, scorer.validation, scorer.preview), scorer


def run_job(config: KDTraining | SampleFolder, folder: Path) -> None:
    """Trains, or samples, to the end; whoever follows the processes can read how it ended."""
    try:
        if isinstance(config, KDTraining):
            scorer = Scorer(config, config.device)
            train(config, folder, config.device, scorer.validation, scorer.preview)
        else:
            sample(config, folder, _prompts(config))
    except Exception as error:
        print(f"{LAST_WORDS[0]}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise
    if is_main_process():
        mark_finished(folder)


def _prompts(config: SampleFolder) -> list[Prompt] | None:
    """Those of a subject that notebook 05 has trained; None where no subject is named."""
    if config.subject is None:
        return None
    preset = "storybook" if config.subject in SUBJECTS else "sd-v1.4"
    identifier = config.identifier or DreamBoothTraining.filled(preset=preset).identifier
    return load_subject(config.subject, config.class_word).prompts(identifier, config.num_images or 1)
