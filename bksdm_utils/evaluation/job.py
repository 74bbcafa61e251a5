"""Sampling a folder of images as a command, in one process or several."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState

from ..files import folder_lock, write_json
from ..models.lora import load_lora
from ..models.pipelines import Pipeline, load_pipeline, load_unet, sampling_dtype, with_unet
from ..processes import LAST_WORDS, check_same, follow, launch, mark_finished, running
from ..workbook.parameters import literal
from .folders import Progress, read_manifest, sample_folder
from .prompts import Prompt, read_prompts, storybook_prompts
from .sampling import Sampling


@dataclass(frozen=True)
class Job:
    """A folder of pictures as a command or a launcher makes it.

    Attributes:
        teacher: a pipeline's folder or hub id.
        unet: a U-Net that takes the place of the pipeline's, or None.
        lora: a LoRA on top of it, or None.
        prompts: a CSV file as `read_prompts` takes it; None takes the storybook's test captions.
        num_images: the first so many prompts; None takes all of a file, and 100 of the storybook's.
    """

    teacher: str = "data/storybook/teacher"
    unet: str | None = None
    lora: str | None = None
    prompts: str | None = None
    num_images: int | None = None

    def read_prompts(self) -> list[Prompt]:
        """The prompts that the job is about."""
        if self.prompts is None:
            return storybook_prompts(self.num_images or 100)
        return read_prompts(self.prompts, self.num_images)

    def load(self, device: str) -> Pipeline:
        """The pipeline that the job is about; a GPU's has half precision."""
        pipeline = load_pipeline(self.teacher, device, sampling_dtype(device))
        if self.unet is not None:
            pipeline = with_unet(pipeline, load_unet(self.unet, pipeline))
        return load_lora(pipeline, self.lora) if self.lora is not None else pipeline


def write_job(folder: Path, job: Job, sampling: Sampling) -> None:
    """Writes config.json, which `launch(folder, n, "bksdm_utils.evaluation.job")` reads.

    Raises:
        ValueError: other settings are at work there.
    """
    config = {"job": asdict(job), "sampling": asdict(sampling)}
    check_same(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


def sample_in_processes(
    job: Job, prompts: Sequence[Prompt], folder: Path, sampling: Sampling, num_processes: int
) -> Iterator[Progress]:
    """What `sample` does, in so many processes of their own, which outlive this one; yields once a second.

    Raises:
        RuntimeError: they ended early; their last words are in the message.
    """
    if not running(folder):
        with folder_lock(folder, wait=True):  # another kernel's run may be filling it
            pass
    write_job(folder, job, sampling)
    launch(folder, num_processes, "bksdm_utils.evaluation.job")
    for _ in follow(folder):
        yield Progress(min(len(read_manifest(folder)), len(prompts)), len(prompts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws a folder of pictures, in as many processes as it is launched in, going on where it stopped."""
    parser = argparse.ArgumentParser(prog="python -m bksdm_utils.evaluation.job", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path, nargs="?", help="where images/, sampling.json and the manifest go")
    parser.add_argument("--config", type=Path, help="the folder's config.json, instead of parameters")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help=", ".join(f.name for kind in (Job, Sampling) for f in fields(kind)))  # fmt: skip
    chosen = parser.parse_args(arguments)
    if (chosen.folder is None) == (chosen.config is None):
        parser.error("expected either a folder or --config")
    try:
        if chosen.config:
            about = json.loads(chosen.config.read_text(encoding="utf-8"))
            folder, job, sampling = chosen.config.parent, Job(**about["job"]), Sampling(**about["sampling"])
        else:
            folder, (job, sampling) = chosen.folder, _given(chosen.parameter)
        _sample_to_the_end(folder, job, sampling)
    except (ValueError, OSError) as error:
        print(f"{LAST_WORDS[0]}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 1
    if PartialState().is_main_process and chosen.config:
        mark_finished(folder)
    return 0


def _given(parameters: Sequence[tuple[str, str]]) -> tuple[Job, Sampling]:
    values = {name: literal(value) for name, value in parameters}
    kinds = [{f.name for f in fields(kind)} for kind in (Job, Sampling)]
    unknown = sorted(set(values) - kinds[0] - kinds[1])
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}: expected {', '.join(sorted(kinds[0] | kinds[1]))}")
    return tuple(kind(**{n: v for n, v in values.items() if n in names})
                 for kind, names in zip((Job, Sampling), kinds, strict=True))  # fmt: skip


def _sample_to_the_end(folder: Path, job: Job, sampling: Sampling) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = PartialState(cpu=device == "cpu")
    prompts = job.read_prompts()
    pipeline, said = job.load(device), -1
    for progress in sample_folder(pipeline, prompts, folder, sampling):
        share = 20 * progress.done // max(1, progress.total)
        if state.is_main_process and share != said:
            print(f"{progress.done}/{progress.total} pictures", flush=True)
            said = share


if __name__ == "__main__":
    sys.exit(main())
