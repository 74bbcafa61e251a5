"""Jobs that outlive a notebook, wired together: training with its validation, sampling in processes."""

from __future__ import annotations

from pathlib import Path

from ..config.evaluation import SampleFolder
from ..config.training import KDTraining
from ..evaluation.folders import sample
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
            sample(config, folder)
    except Exception as error:
        print(f"{LAST_WORDS[0]}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise
    if is_main_process():
        mark_finished(folder)
