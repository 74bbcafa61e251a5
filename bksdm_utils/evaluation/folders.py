"""Folders of images: sampled from prompts, resumed where they stopped, shared by several processes (notebook 04).

An image depends on the model, the settings, its prompt and its id: not on order, processes or interruptions. It has its
final name only when it is complete; sampling.json has what the images of a folder share, and their texts.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from ..config.evaluation import FolderSampling, SampleFolder
from ..files import ROOT, folder_lock, in_threads, is_main_process, write_json
from ..models.hashes import model_hash
from ..models.lora import load_lora
from ..models.pipelines import Pipeline, load_pipeline, load_unet, sampling_dtype, with_unet
from ..processes import follow, launch, running
from .prompts import Prompt, check_prompts, read_prompts, storybook_prompts
from .sampling import check_steps, image_seed, sample_batches, sample_running

ENCODINGS = {"png": (".png", {"format": "PNG"}), "jpeg": (".jpg", {"format": "JPEG", "quality": 75})}


@dataclass(frozen=True)
class Progress:
    """How many images of a folder are complete, how many are wanted, and the newest."""

    done: int
    total: int
    newest: tuple[tuple[Prompt, Image.Image], ...] = ()


def sample_folder(
    pipeline: Pipeline, prompts: Sequence[Prompt], folder: Path, sampling: FolderSampling, model: str | None = None
) -> Iterator[Progress]:
    """Samples what a folder lacks: `images/<id>.png` or `.jpg`.

    Complete images of the same model and settings are kept; missing or damaged ones are sampled again. Each of several
    processes (accelerate's) samples its share.

    Args:
        model: `model_hash(pipeline)`, where it is known already.

    Yields:
        Progress at the beginning and after every pass.

    Raises:
        ValueError: the folder has images of another model, of other settings or prompts; ids that cannot name files;
            too few steps for the scheduler.
    """
    check_prompts(prompts)
    check_steps(pipeline, sampling)
    state = PartialState(cpu=pipeline.device.type == "cpu")
    if sampling.noise == "running" and state.num_processes > 1:
        raise ValueError("noise is running, which one process draws in order: expected by_id with several processes")
    # In several processes the others would wait in vain for the main one, and NCCL would end them.
    with folder_lock(folder, wait=state.num_processes == 1):
        complete = _claim(folder, prompts, _settings(model or model_hash(pipeline), sampling), state)
        missing = [prompt for prompt in prompts if prompt.id not in complete]
        before, done, total = len(prompts) - len(missing), 0, len(prompts)
        yield Progress(before, total)
        # A share of what is missing: a share of all prompts may be complete, and its process would wait for the others.
        share = missing[state.process_index :: state.num_processes]
        for newest in _passes(pipeline, prompts, share, sampling):
            for prompt, image in newest:
                write_image(folder, prompt.id, image, sampling.image_format)
            done += len(newest)
            yield Progress(min(total, before + done * state.num_processes), total, newest)
        state.wait_for_everyone()  # one lock for all


def _passes(
    pipeline: Pipeline, prompts: Sequence[Prompt], share: Sequence[Prompt], sampling: FolderSampling
) -> Iterator[tuple[tuple[Prompt, Image.Image], ...]]:
    """The prompts of `share` with their images, pass by pass."""
    if sampling.noise == "running":
        ids = {prompt.id for prompt in share}
        wanted = [prompt.id in ids for prompt in prompts]
        for chosen, images in sample_running(pipeline, [prompt.text for prompt in prompts], wanted, sampling):
            pairs = zip(prompts[chosen], images, strict=True)
            yield tuple((prompt, image) for prompt, image in pairs if prompt.id in ids)
        return
    seeds, done = [image_seed(sampling.seed, prompt.id) for prompt in share], 0
    for images in sample_batches(pipeline, [prompt.text for prompt in share], seeds, sampling):
        yield tuple(zip(share[done : done + len(images)], images, strict=True))
        done += len(images)


def _claim(folder: Path, prompts: Sequence[Prompt], settings: Mapping, state: PartialState) -> Mapping[str, str]:
    """Records what the images of a folder share, and their texts; returns its complete images."""
    path, texts, complete = folder / "sampling.json", {}, {}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if any((folder / "images").iterdir()):
        complete = complete_images(folder, prompts)
        before = json.loads(path.read_text(encoding="utf-8"))
        texts = before.pop("texts", {})
        if other := [f"{n} {before.get(n)!r}, now {settings[n]!r}" for n in settings if before.get(n) != settings[n]]:
            raise ValueError(f"{folder} has images of {'; of '.join(other)}: use another folder, or delete this one")
    state.wait_for_everyone()  # all have read the same before any writes
    if state.is_main_process:
        write_json(path, {**settings, "texts": {**texts, **{prompt.id: prompt.text for prompt in prompts}}})
    state.wait_for_everyone()  # no image before its text
    return complete


def write_image(folder: Path, id: str, image: Image.Image, image_format: str) -> None:
    """Writes an image of a folder under a temporary name, and renames it."""
    suffix, options = ENCODINGS[image_format]
    path = folder / "images" / f"{id}{suffix}"
    part = path.with_name(path.name + ".part")
    image.save(part, **options)
    os.replace(part, path)


def image_path(folder: Path, id: str) -> Path:
    """The file of an image, in the folder's format."""
    png, jpeg = (folder / "images" / f"{id}{suffix}" for suffix, _ in ENCODINGS.values())
    return png if png.exists() else jpeg


def check_is_image_folder(folder: Path) -> None:
    """Raises ValueError for a folder that `sample_folder` did not fill."""
    if not (folder / "sampling.json").is_file():
        raise ValueError(f"{folder} has no sampling.json: expected a folder of images as notebook 04 samples them")


def complete_images(folder: Path, prompts: Sequence[Prompt]) -> dict[str, str]:
    """The images of these prompts that exist and can be read to their end: id -> a hash of the file.

    Raises:
        ValueError: `sample_folder` did not fill this folder, or filled it with images of other texts under these ids.
    """
    check_is_image_folder(folder)
    texts = json.loads((folder / "sampling.json").read_text(encoding="utf-8")).get("texts", {})

    def checked(prompt: Prompt) -> str | None:
        try:
            content = image_path(folder, prompt.id).read_bytes()
            Image.open(io.BytesIO(content)).load()
        except Exception:  # Pillow raises many kinds for a broken file
            return None
        if texts.get(prompt.id) != prompt.text:
            raise ValueError(f"{folder} has image {prompt.id} of {texts.get(prompt.id)!r}, now it is {prompt.text!r}: "
                             "other prompts under the same ids. Use another folder")  # fmt: skip
        return hashlib.sha256(content).hexdigest()

    hashes = zip(prompts, in_threads(checked, prompts), strict=True)
    return {prompt.id: sha256 for prompt, sha256 in hashes if sha256}


def delete_images(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Deletes the images of these prompts, so that they are sampled again; those of others stay.

    Raises:
        ValueError: processes are filling the folder.
    """
    if running(folder):
        raise ValueError(f"processes are filling {folder}: wait for them, or stop them by bksdm_utils.processes.stop")
    with folder_lock(folder, wait=True):
        for prompt in prompts:
            image_path(folder, prompt.id).unlink(missing_ok=True)


def _settings(model: str, sampling: FolderSampling) -> dict:
    """What the images of a folder share; the batch size changes none of them, unless their noise is a running one."""
    free = ("noise", "batch_size") if sampling.noise == "by_id" else ()
    return {"model": model} | {name: value for name, value in sampling.values().items() if name not in free}


def folder_of(images_dir: str | Path | None, name: str, model: str, sampling: FolderSampling) -> Path:
    """The folder of a model's images, which runs with the same model and settings share.

    Args:
        images_dir: None is outputs/cache/images.
        model: `model_hash` of the pipeline.
    """
    key = hashlib.sha256(json.dumps(_settings(model, sampling), sort_keys=True).encode()).hexdigest()[:12]
    return Path(images_dir or ROOT / "outputs" / "cache" / "images") / f"{name}-{key}"


def read_job_prompts(config: SampleFolder) -> list[Prompt]:
    """The prompts of a folder: of a CSV file, or the storybook's test captions."""
    if config.prompt is not None:
        return [Prompt(str(i), config.prompt) for i in range(config.num_images or 1)]
    if config.prompts is None:
        return storybook_prompts(config.num_images or 100)
    return read_prompts(config.prompts, config.num_images)


def sample(config: SampleFolder, folder: Path, prompts: Sequence[Prompt] | None = None) -> None:
    """Fills a folder in this process, or as one of the processes of a launcher; prints at most a dozen lines.

    On a GPU in half precision; another U-Net and a LoRA where they are named.

    Args:
        prompts: others than the configuration's.
    """
    pipeline = load_pipeline(config.teacher, config.device, sampling_dtype(config.device))
    if config.unet is not None:
        pipeline = with_unet(pipeline, load_unet(config.unet, pipeline))
    if config.lora is not None:
        pipeline = load_lora(pipeline, config.lora)
    printed = -1
    for progress in sample_folder(pipeline, prompts or read_job_prompts(config), folder, config.part(FolderSampling)):
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
    launch(folder, num_processes, "sample", config.model_dump(mode="json"))
    ids = {prompt.id for prompt in prompts}
    for _ in follow(folder):
        names = os.listdir(folder / "images") if (folder / "images").is_dir() else ()
        yield Progress(len({os.path.splitext(name)[0] for name in names} & ids), len(ids))
