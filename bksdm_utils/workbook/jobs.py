"""Jobs that outlive a notebook, wired together: training with its validation, sampling in processes."""

from __future__ import annotations

from pathlib import Path

from ..config.evaluation import SampleFolder
from ..config.training import KDTraining
from ..evaluation.job import sample
from ..evaluation.scorer import Scorer
from ..files import is_main_process
from ..processes import LAST_WORDS, mark_finished
from ..training.job import KDJob, prepare, train


def prepare_training(config: KDTraining, folder: Path) -> tuple[KDJob, Scorer]:
    """A distillation run and the scorer that validates it."""
    scorer = Scorer(config, config.device)
    return prepare(config, folder, config.device, scorer.validate), scorer


def train_student(config: KDTraining, folder: Path) -> None:
    """Trains to the end; leaves checkpoints, unet and unet_ema."""
    scorer = Scorer(config, config.device)
    _to_the_end(folder, train, config, folder, config.device, scorer.validate)


def sample_images(config: SampleFolder, folder: Path) -> None:
    """Samples to the end."""
    _to_the_end(folder, sample, config, folder)


def _to_the_end(folder: Path, work, *args) -> None:
    """Runs it; its end, good or bad, can be read by who follows the processes."""
    try:
        work(*args)
    except Exception as error:
        print(f"{LAST_WORDS[0]}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise
    if is_main_process():
        mark_finished(folder)
