"""Sampling a folder of images as a command, in one process or several (notebook 04, `bksdm sample`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.evaluation import FolderSampling, SampleFolder
from ..files import folder_lock, is_main_process, write_json
from ..models.lora import load_lora
from ..models.pipelines import Pipeline, load_pipeline, load_unet, sampling_dtype, with_unet
from ..processes import check_same, follow, launch, running
from .folders import Progress, sample_folder
from .prompts import Prompt, read_prompts, storybook_prompts


def read_job_prompts(config: SampleFolder) -> list[Prompt]:
    """The prompts of a folder: of a CSV file, or the storybook's test captions."""
    if config.prompts is None:
        return storybook_prompts(config.num_images or 100)
    return read_prompts(config.prompts, config.num_images)


def load_job_pipeline(config: SampleFolder) -> Pipeline:
    """The pipeline of a folder, with another U-Net and a LoRA where they are named; half precision on a GPU."""
    pipeline = load_pipeline(config.teacher, config.device, sampling_dtype(config.device))
    if config.unet is not None:
        pipeline = with_unet(pipeline, load_unet(config.unet, pipeline))
    return load_lora(pipeline, config.lora) if config.lora is not None else pipeline


def sample(config: SampleFolder, folder: Path) -> None:
    """Fills a folder in this process, or as one of the processes of a launcher; prints at most a dozen lines."""
    prompts, printed = read_job_prompts(config), -1
    for progress in sample_folder(load_job_pipeline(config), prompts, folder, config.part(FolderSampling)):
        tenths = 10 * progress.done // progress.total
        if is_main_process() and tenths != printed:
            print(f"{progress.done:,} of {progress.total:,} images", flush=True)
            printed = tenths


def sample_in_processes(
    config: SampleFolder, prompts: Sequence[Prompt], folder: Path, num_processes: int
) -> Iterator[Progress]:
    """As `sample`, in processes that outlive this one; yields once a second.

    Raises:
        ValueError: processes with other settings are filling the folder.
        RuntimeError: they ended early; the message has the reason they gave.
    """
    if not running(folder):
        with folder_lock(folder, wait=True):  # another kernel's run may be filling it
            pass
    content = config.model_dump(mode="json")
    check_same(folder, content)
    write_json(folder / "config.json", content)
    launch(folder, num_processes, "sample")
    ids = {prompt.id for prompt in prompts}
    for _ in follow(folder):
        names = os.listdir(folder / "images") if (folder / "images").is_dir() else ()
        yield Progress(len({os.path.splitext(name)[0] for name in names} & ids), len(ids))
