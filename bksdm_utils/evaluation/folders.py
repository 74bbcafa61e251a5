"""Folders of images: sampled from prompts, each with a line in a manifest, and resumed where they stopped.

An image depends on the model, the settings, its prompt and its id alone: not on order, processes or interruptions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from ..files import ROOT, folder_lock, in_threads, write_json
from ..models.hashes import model_hash
from ..models.pipelines import Pipeline
from ..processes import running
from .prompts import Prompt, check_prompts
from .sampling import SUFFIXES, Sampling, check_steps, image_seed, sample_batches


@dataclass(frozen=True)
class ManifestEntry:
    """A line of the manifest: a picture that is in the folder, and what it was drawn from."""

    id: str
    text: str
    seed: int
    sha256: str


@dataclass(frozen=True)
class Progress:
    """How far a folder is: pictures there, pictures wanted, and those that have just come."""

    done: int
    total: int
    newest: tuple[tuple[Prompt, Image.Image], ...] = ()


def sample_folder(
    pipeline: Pipeline, prompts: Sequence[Prompt], folder: Path, sampling: Sampling, model: str | None = None
) -> Iterator[Progress]:
    """Draws what is missing in a folder: `images/<id>.png` or `.jpg`, each with a line in a manifest.

    Pictures that stand there whole, drawn by the same model with the same settings, are kept; lost or damaged ones are
    drawn again. Of several processes (accelerate's) each draws its share.

    Args:
        model: `model_hash(pipeline)`, where it is known already.

    Yields:
        Progress at the beginning and after every pass.

    Raises:
        ValueError: the folder holds another model's pictures, or other settings' or prompts'; ids cannot be used, or
            the scheduler needs more steps.
    """
    check_prompts(prompts)
    check_steps(pipeline, sampling)
    state = PartialState(cpu=pipeline.device.type == "cpu")
    # In several processes the others would wait in vain for the main one, and NCCL would end them.
    with folder_lock(folder, wait=state.num_processes == 1):
        _claim(folder, {"model": model or model_hash(pipeline), **_fixed(sampling)}, state.is_main_process)
        state.wait_for_everyone()
        have = complete_images(folder)
        check_same_prompts(folder, prompts, have)
        state.wait_for_everyone()  # all have read the same before any writes
        missing = [prompt for prompt in prompts if prompt.id not in have]
        there, total = len(prompts) - len(missing), len(prompts)
        yield Progress(there, total)
        # Of what is missing: a share of all prompts might be there already, and its process wait till NCCL ends it.
        share = missing[state.process_index :: state.num_processes]
        for done, newest in _fill(pipeline, share, folder, sampling):
            yield Progress(min(total, there + done * state.num_processes), total, newest)
        state.wait_for_everyone()  # the lock is everybody's


def _fill(
    pipeline: Pipeline, missing: Sequence[Prompt], folder: Path, sampling: Sampling
) -> Iterator[tuple[int, tuple[tuple[Prompt, Image.Image], ...]]]:
    """Draws `missing` into the folder; yields after every pass how many are done, and the newest."""
    seeds, done = [image_seed(sampling.seed, p.id) for p in missing], 0
    with _manifest(folder / f"manifest-{PartialState().process_index}.jsonl") as manifest:
        for pictures in sample_batches(pipeline, [p.text for p in missing], seeds, sampling):
            new = range(done, done + len(pictures))
            for i, picture in zip(new, pictures, strict=True):
                sha256 = _write_image(_path(folder, missing[i].id, sampling.image_format), picture)
                line = asdict(ManifestEntry(missing[i].id, missing[i].text, seeds[i], sha256))
                manifest.write(json.dumps(line, ensure_ascii=False) + "\n")
            manifest.flush()
            done += len(pictures)
            yield done, tuple(zip((missing[i] for i in new), pictures, strict=True))


def _fixed(sampling: Sampling) -> dict:
    """The settings that a folder's pictures must share; the batch size changes none of them."""
    return {name: value for name, value in asdict(sampling).items() if name != "batch_size"}


def _claim(folder: Path, about: Mapping, main: bool) -> None:
    """Writes what the pictures of a folder share, or checks that it is so."""
    path, images = folder / "sampling.json", folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    if path.exists() and any(images.iterdir()):
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} {before.get(name)!r}, now {value!r}" for name, value in about.items()
                 if before.get(name) != value]  # fmt: skip
        if other:
            raise ValueError(f"{folder} holds pictures of {'; of '.join(other)}: pictures of two kinds are not mixed. "
                             "Use another folder, or delete this one")  # fmt: skip
    elif any(images.iterdir()) and main:
        raise ValueError(f"{images} holds pictures, but no sampling.json says whose: use another folder")
    elif main:
        write_json(path, about)


def _path(folder: Path, id: str, image_format: str) -> Path:
    return folder / "images" / f"{id}{SUFFIXES[image_format]}"


def _write_image(path: Path, picture: Image.Image) -> str:
    """Writes it under a temporary name and renames it; returns the sha256 of the file."""
    part = path.with_name(path.name + ".part")
    if path.suffix == ".jpg":
        picture.save(part, "JPEG", quality=75)
    else:
        picture.save(part, "PNG")
    sha256 = hashlib.sha256(part.read_bytes()).hexdigest()
    os.replace(part, path)
    return sha256


@contextmanager
def _manifest(path: Path) -> Iterator:
    """The manifest, to be written on; a line that a kill tore is cut off first."""
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
    with path.open("a", encoding="utf-8") as file:
        yield file


def read_manifest(folder: Path) -> list[ManifestEntry]:
    """Every line of a folder's manifests, one file for each process; torn lines are left out."""
    drawn, names = [], {f.name for f in fields(ManifestEntry)}
    for path in sorted(folder.glob("manifest-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                about = json.loads(line)
            except ValueError:
                continue
            if isinstance(about, dict) and names <= set(about):
                drawn.append(ManifestEntry(**{name: about[name] for name in names}))
    return drawn


def complete_images(folder: Path) -> dict[str, ManifestEntry]:
    """The pictures of a folder that are what its manifest says, by id."""
    image_format = _image_format(folder)

    def whole(drawn: ManifestEntry) -> bool:
        try:
            return hashlib.sha256(_path(folder, drawn.id, image_format).read_bytes()).hexdigest() == drawn.sha256
        except OSError:
            return False

    listed = read_manifest(folder)
    return {drawn.id: drawn for drawn, good in zip(listed, in_threads(whole, listed), strict=True) if good}


def image_path(folder: Path, id: str) -> Path:
    """Where the picture of an id stands."""
    return _path(folder, id, _image_format(folder))


def check_is_image_folder(folder: Path) -> None:
    """Raises ValueError for a folder that `sample` never worked on."""
    if not (folder / "sampling.json").is_file():
        raise ValueError(f"{folder} has no sampling.json: expected a folder of pictures as notebook 04 fills them")


def delete_images(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Deletes the pictures of these prompts, so that `sample` draws them anew; those of others stay.

    Raises:
        ValueError: processes of their own are filling the folder.
    """
    if not (folder / "sampling.json").is_file():
        return
    if running(folder):
        raise ValueError(f"{folder} is being filled: wait for it, or stop it by bksdm_utils.processes.stop")
    with folder_lock(folder, wait=True):
        for prompt in prompts:
            image_path(folder, prompt.id).unlink(missing_ok=True)
        _without(folder, {prompt.id for prompt in prompts})


def _without(folder: Path, ids: set[str]) -> None:
    """Drops the lines of these ids from a folder's manifests."""
    left = [drawn for drawn in read_manifest(folder) if drawn.id not in ids]
    part = folder / "manifest.part"
    part.write_text("".join(json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in left), encoding="utf-8")
    for path in folder.glob("manifest-*.jsonl"):
        path.unlink()
    os.replace(part, folder / "manifest-0.jsonl")


def _image_format(folder: Path) -> str:
    check_is_image_folder(folder)
    path = folder / "sampling.json"
    return _read_image_format(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read_image_format(path: Path, written: int) -> str:
    """Asked for with every picture; `written`, the file's time, tells a folder that was made anew."""
    return json.loads(path.read_text(encoding="utf-8"))["image_format"]


def check_same_prompts(folder: Path, prompts: Sequence[Prompt], have: Mapping[str, ManifestEntry]) -> None:
    """Raises ValueError where a picture that the folder has was drawn from another text than its prompt's."""
    for prompt in prompts:
        drawn = have.get(prompt.id)
        if drawn is not None and drawn.text != prompt.text:
            raise ValueError(f"{folder} holds picture {prompt.id} of {drawn.text!r}, now it is {prompt.text!r}: other "
                             "prompts under old ids. Use another folder")  # fmt: skip


def folder_of(cache_dir: str | Path | None, name: str, model: str, sampling: Sampling) -> Path:
    """Where a model's pictures are kept, so that runs with the same model and settings share them.

    Args:
        cache_dir: None is outputs/cache/pictures.
        model: `model_hash` of the pipeline.
    """
    about = json.dumps({"model": model, **_fixed(sampling)}, sort_keys=True)
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    return Path(cache_dir or ROOT / "outputs" / "cache" / "pictures") / f"{name}-{key}"
