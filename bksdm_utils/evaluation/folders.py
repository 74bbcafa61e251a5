"""Folders of images: sampled from prompts, resumed where they stopped, shared by several processes (notebook 04).

An image depends on the model, the settings, its prompt and its id: not on order, processes or interruptions. It has its
final name only when it is complete; a line of a manifest then records its prompt and the hash of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from ..config.evaluation import FolderSampling
from ..files import ROOT, folder_lock, in_threads, write_json
from ..models.hashes import model_hash
from ..models.pipelines import Pipeline
from ..processes import running
from .prompts import Prompt, check_prompts
from .sampling import check_steps, image_seed, sample_batches

ENCODINGS = {"png": (".png", {"format": "PNG"}), "jpeg": (".jpg", {"format": "JPEG", "quality": 75})}


@dataclass(frozen=True)
class ManifestEntry:
    """An image of a folder, and what it was sampled from."""

    id: str
    text: str
    seed: int
    sha256: str


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
    # In several processes the others would wait in vain for the main one, and NCCL would end them.
    with folder_lock(folder, wait=state.num_processes == 1):
        _claim(folder, _settings(model or model_hash(pipeline), sampling), state.is_main_process)
        state.wait_for_everyone()
        complete = complete_images(folder)
        check_same_prompts(folder, prompts, complete)
        state.wait_for_everyone()  # all have read the same before any writes
        missing = [prompt for prompt in prompts if prompt.id not in complete]
        before, total = len(prompts) - len(missing), len(prompts)
        yield Progress(before, total)
        # A share of what is missing: a share of all prompts may be complete, and its process would wait for the others.
        share = missing[state.process_index :: state.num_processes]
        for done, newest in _sample_into(folder, pipeline, share, sampling):
            yield Progress(min(total, before + done * state.num_processes), total, newest)
        state.wait_for_everyone()  # one lock for all


def _sample_into(folder: Path, pipeline: Pipeline, prompts: Sequence[Prompt], sampling: FolderSampling) -> Iterator:
    """Yields after every pass how many images are done, and the newest."""
    seeds, done = [image_seed(sampling.seed, prompt.id) for prompt in prompts], 0
    for images in sample_batches(pipeline, [prompt.text for prompt in prompts], seeds, sampling):
        chosen = slice(done, done + len(images))
        newest = tuple(zip(prompts[chosen], images, strict=True))
        add_images(folder, newest, seeds[chosen], sampling.image_format)
        done += len(images)
        yield done, newest


def add_images(folder: Path, images: Sequence[tuple[Prompt, Image.Image]], seeds: Sequence[int], image_format: str):
    """Writes images, each under a temporary name first, and adds them to this process's manifest."""
    (suffix, options), entries = ENCODINGS[image_format], []
    for (prompt, image), seed in zip(images, seeds, strict=True):
        path = folder / "images" / f"{prompt.id}{suffix}"
        part = path.with_name(path.name + ".part")
        image.save(part, **options)
        entries.append(ManifestEntry(prompt.id, prompt.text, seed, hashlib.sha256(part.read_bytes()).hexdigest()))
        os.replace(part, path)
    _append(folder, entries)


def _append(folder: Path, entries: Iterable[ManifestEntry]) -> None:
    with (folder / f"manifest-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
        # The line break comes first, for the last line may be one that a kill cut off.
        file.write("".join(f"\n{json.dumps(asdict(entry))}" for entry in entries))


def read_manifest(folder: Path) -> list[ManifestEntry]:
    """The entries of a folder's manifests, one file for each process; a line that was cut off is left out."""
    entries = []
    for path in sorted(folder.glob("manifest-*.jsonl")):
        for line in path.read_text(errors="replace").split("\n"):
            try:
                entries.append(ManifestEntry(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return entries


def _settings(model: str, sampling: FolderSampling) -> dict:
    """What the images of a folder share; the batch size changes none of them."""
    return {"model": model} | {name: value for name, value in sampling.values().items() if name != "batch_size"}


def _claim(folder: Path, settings: Mapping, main: bool) -> None:
    """Writes what the images of a folder share, or raises ValueError where it has images of something else."""
    path, images = folder / "sampling.json", folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    if not any(images.iterdir()):
        return write_json(path, settings) if main else None
    check_is_image_folder(folder)
    before = json.loads(path.read_text(encoding="utf-8"))
    if other := [f"{n} {before.get(n)!r}, now {value!r}" for n, value in settings.items() if before.get(n) != value]:
        raise ValueError(f"{folder} has images of {'; of '.join(other)}: use another folder, or delete this one")


def check_is_image_folder(folder: Path) -> None:
    """Raises ValueError for a folder that `sample_folder` did not fill."""
    if not (folder / "sampling.json").is_file():
        raise ValueError(f"{folder} has no sampling.json: expected a folder of images as notebook 04 samples them")


def check_same_prompts(folder: Path, prompts: Sequence[Prompt], complete: Mapping[str, ManifestEntry]) -> None:
    """Raises ValueError where an image of the folder was sampled from another text than its prompt's."""
    for prompt in prompts:
        entry = complete.get(prompt.id)
        if entry is not None and entry.text != prompt.text:
            raise ValueError(f"{folder} has image {prompt.id} of {entry.text!r}, now it is {prompt.text!r}: other "
                             "prompts under the same ids. Use another folder")  # fmt: skip


def image_path(folder: Path, id: str) -> Path:
    """The file of an image, in the folder's format."""
    png, jpeg = (folder / "images" / f"{id}{suffix}" for suffix, _ in ENCODINGS.values())
    return png if png.exists() else jpeg


def complete_images(folder: Path) -> dict[str, ManifestEntry]:
    """The images whose file has the hash that the manifest records, by id."""
    check_is_image_folder(folder)

    def is_complete(entry: ManifestEntry) -> bool:
        try:
            return hashlib.sha256(image_path(folder, entry.id).read_bytes()).hexdigest() == entry.sha256
        except OSError:
            return False

    entries = read_manifest(folder)
    return {entry.id: entry for entry, whole in zip(entries, in_threads(is_complete, entries), strict=True) if whole}


def delete_images(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Deletes the images of these prompts, so that they are sampled again; those of others stay.

    Raises:
        ValueError: processes are filling the folder.
    """
    if not (folder / "sampling.json").is_file():
        return
    if running(folder):
        raise ValueError(f"processes are filling {folder}: wait for them, or stop them by bksdm_utils.processes.stop")
    with folder_lock(folder, wait=True):
        ids = {prompt.id for prompt in prompts}
        kept = [entry for entry in read_manifest(folder) if entry.id not in ids]
        for path in (*(image_path(folder, id) for id in ids), *folder.glob("manifest-*.jsonl")):
            path.unlink(missing_ok=True)
        _append(folder, kept)


def folder_of(images_dir: str | Path | None, name: str, model: str, sampling: FolderSampling) -> Path:
    """The folder of a model's images, which runs with the same model and settings share.

    Args:
        images_dir: None is outputs/cache/images.
        model: `model_hash` of the pipeline.
    """
    key = hashlib.sha256(json.dumps(_settings(model, sampling), sort_keys=True).encode()).hexdigest()[:12]
    return Path(images_dir or ROOT / "outputs" / "cache" / "images") / f"{name}-{key}"
