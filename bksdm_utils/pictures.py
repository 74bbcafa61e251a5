"""Folders of pictures: drawn from prompts, each with a line in a manifest, and gone on with where they stopped.

A picture depends on the model, the settings, its prompt and its id alone: not on order, processes or interruptions.

    python -m bksdm_utils.pictures FOLDER -p teacher CompVis/stable-diffusion-v1-4 -p prompts metadata.csv
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from . import processes, storybook
from .data import in_threads
from .downloads import DOWNLOADS
from .engine import alone
from .presets import ROOT, Missing, resolve
from .run import literal, write_json
from .sampling import (
    SUFFIXES,
    Pipeline,
    Sampling,
    check_steps,
    draw,
    drawing_dtype,
    load_lora,
    load_pipeline,
    load_unet,
    model_hash,
    picture_seed,
    with_unet,
)

TEXT_COLUMNS, ID_COLUMNS = ("text", "prompt", "caption"), ("id", "file_name")
FILES = re.compile(r"\.(jpe?g|png|webp|bmp)$", re.IGNORECASE)
ID = re.compile(r"[\w+=-][\w.+=-]*")
ID_BYTES = 150  # a disk's names have 255 at most


@dataclass(frozen=True)
class Prompt:
    """What a picture shall show; its id names the file and, with the run's seed, gives the noise."""

    id: str
    text: str


def storybook_prompts(num_images: int, split: str = "test") -> list[Prompt]:
    """The captions of the first scenes of a storybook split."""
    return [Prompt(f"{split}-{i}", storybook.sample_scene(i, split).caption) for i in range(num_images)]


def storybook_scene(prompt: Prompt) -> storybook.Scene | None:
    """The scene of one of `storybook_prompts`; None for any other prompt."""
    split, _, number = prompt.id.rpartition("-")
    if split not in storybook.SPLITS or not number.isdecimal():
        return None
    scene = storybook.sample_scene(int(number), split)
    return scene if scene.caption == prompt.text else None


def read_prompts(path: str | Path, num_images: int | None = None) -> list[Prompt]:
    """Prompts from a CSV file: text from the column text, prompt or caption, ids from id or file_name, or row numbers.

    COCO's metadata.csv is such a file; there COCO_val2014_000000000042.jpg is the picture of id
    COCO_val2014_000000000042. Rows without a text are set aside, and counted in a line.

    Args:
        num_images: the first so many that have a text, and no row after them is looked at; None takes all.

    Raises:
        Missing: COCO's captions, not fetched yet.
        ValueError: no such file, no such columns, no prompts, or ids that cannot name files; it names the rows.
    """
    path = Path(resolve(path))
    rows, columns = _table(path)
    text, name = (next((c for c in names if c in columns), None) for names in (TEXT_COLUMNS, ID_COLUMNS))
    if text is None:
        raise ValueError(f"{path} has the columns {', '.join(columns)}: expected one of {', '.join(TEXT_COLUMNS)}")
    prompts, without = [], []
    for i, row in enumerate(rows):
        if len(prompts) == num_images:
            break
        told = Prompt(_id_of(row, name) if name else str(i), (row[text] or "").strip())
        if not told.text:
            without.append(i + 1)
        elif not told.id:
            raise ValueError(f"{path}, row {i + 1}: {name} is empty. Give every row an id, or leave the column out")
        else:
            prompts.append(told)
    if without:
        print(f"{path.name}: {len(without)} rows without a text set aside, such as row {without[0]}")
    check_prompts(prompts, str(path))
    return prompts


def not_here(path: Path) -> type[ValueError]:
    """What to raise for a file that is not there: `Missing` for one of `DOWNLOADS`; any other was mistyped."""
    return Missing if ROOT / path in {ROOT / download.path for download in DOWNLOADS.values()} else ValueError


def _table(path: Path) -> tuple[list[dict[str, str]], Sequence[str]]:
    """The rows of a CSV file, and the names of its columns."""
    if not path.is_file():
        raise not_here(path)(f"{path} is missing: expected a CSV file with a column text. COCO's 30,000 captions come "
                             "by python -m bksdm_utils.downloads coco_captions")  # fmt: skip
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file)
            return list(reader), reader.fieldnames or ()
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error


def _id_of(row: Mapping[str, str], column: str) -> str:
    """The id that a row gives; only a file name has a suffix to lose, so that 1.5 and 1.7 stay two."""
    told = (row[column] or "").strip()
    return FILES.sub("", told) if column == "file_name" else told


def check_prompts(prompts: Sequence[Prompt], source: str = "prompts") -> None:
    """Raises ValueError, naming the first few, for ids that cannot name files, ids twice, empty texts or no prompts."""
    if not prompts:
        raise ValueError(f"{source}: no prompts. Give at least one row with a text")
    # Some disks do not tell A from a.
    number = Counter(prompt.id.casefold() for prompt in prompts)
    faults = {
        "an id twice": [p.id for p in prompts if number[p.id.casefold()] > 1],
        "an id that cannot name a file": [
            p.id for p in prompts if not ID.fullmatch(p.id) or len(p.id.encode()) > ID_BYTES
        ],
        "no text": [p.id for p in prompts if not p.text],
    }
    for fault, ids in faults.items():
        if ids:
            raise ValueError(
                f"{source}: {fault} in {len(ids)} rows, such as {', '.join(map(repr, ids[:3]))}. Ids are letters, "
                f"digits and . _ + - =, at most {ID_BYTES} bytes, each once; every row has a text"
            )


# --- a folder of pictures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
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


def sample(
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
    with alone(folder, wait=state.num_processes == 1):
        _claim(folder, {"model": model or model_hash(pipeline), **_fixed(sampling)}, state.is_main_process)
        state.wait_for_everyone()
        have = whole_pictures(folder)
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
    seeds, done = [picture_seed(sampling.seed, p.id) for p in missing], 0
    with _manifest(folder / f"manifest-{PartialState().process_index}.jsonl") as manifest:
        for pictures in draw(pipeline, [p.text for p in missing], seeds, sampling):
            new = range(done, done + len(pictures))
            for i, picture in zip(new, pictures, strict=True):
                sha256 = _write_picture(_path(folder, missing[i].id, sampling.image_format), picture)
                line = asdict(Drawn(missing[i].id, missing[i].text, seeds[i], sha256))
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


def _write_picture(path: Path, picture: Image.Image) -> str:
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


def read_manifest(folder: Path) -> list[Drawn]:
    """Every line of a folder's manifests, one file for each process; torn lines are left out."""
    drawn, names = [], {f.name for f in fields(Drawn)}
    for path in sorted(folder.glob("manifest-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                about = json.loads(line)
            except ValueError:
                continue
            if isinstance(about, dict) and names <= set(about):
                drawn.append(Drawn(**{name: about[name] for name in names}))
    return drawn


def whole_pictures(folder: Path) -> dict[str, Drawn]:
    """The pictures of a folder that are what its manifest says, by id."""
    image_format = _image_format(folder)

    def whole(drawn: Drawn) -> bool:
        try:
            return hashlib.sha256(_path(folder, drawn.id, image_format).read_bytes()).hexdigest() == drawn.sha256
        except OSError:
            return False

    listed = read_manifest(folder)
    return {drawn.id: drawn for drawn, good in zip(listed, in_threads(whole, listed), strict=True) if good}


def picture_path(folder: Path, id: str) -> Path:
    """Where the picture of an id stands."""
    return _path(folder, id, _image_format(folder))


def check_filled(folder: Path) -> None:
    """Raises ValueError for a folder that `sample` never worked on."""
    if not (folder / "sampling.json").is_file():
        raise ValueError(f"{folder} has no sampling.json: expected a folder of pictures as notebook 04 fills them")


def forget(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Deletes the pictures of these prompts, so that `sample` draws them anew; those of others stay.

    Raises:
        ValueError: processes of their own are filling the folder.
    """
    if not (folder / "sampling.json").is_file():
        return
    if processes.running(folder):
        raise ValueError(f"{folder} is being filled: wait for it, or stop it by bksdm_utils.processes.stop")
    with alone(folder, wait=True):
        for prompt in prompts:
            picture_path(folder, prompt.id).unlink(missing_ok=True)
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
    check_filled(folder)
    path = folder / "sampling.json"
    return _read_image_format(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read_image_format(path: Path, written: int) -> str:
    """Asked for with every picture; `written`, the file's time, tells a folder that was made anew."""
    return json.loads(path.read_text(encoding="utf-8"))["image_format"]


def check_same_prompts(folder: Path, prompts: Sequence[Prompt], have: Mapping[str, Drawn]) -> None:
    """Raises ValueError where a picture that the folder has was drawn from another text than its prompt's."""
    for prompt in prompts:
        drawn = have.get(prompt.id)
        if drawn is not None and drawn.text != prompt.text:
            raise ValueError(f"{folder} holds picture {prompt.id} of {drawn.text!r}, now it is {prompt.text!r}: other "
                             "prompts under old ids. Use another folder")  # fmt: skip


# --- in processes of its own ------------------------------------------------------------------------------------------


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
        pipeline = load_pipeline(self.teacher, device, drawing_dtype(device))
        if self.unet is not None:
            pipeline = with_unet(pipeline, load_unet(self.unet, pipeline))
        return load_lora(pipeline, self.lora) if self.lora is not None else pipeline


def write_job(folder: Path, job: Job, sampling: Sampling) -> None:
    """Writes config.json, which `processes.launch(folder, n, "bksdm_utils.pictures")` reads.

    Raises:
        ValueError: other settings are at work there.
    """
    config = {"job": asdict(job), "sampling": asdict(sampling)}
    processes.check_same(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


def sample_in_processes(
    job: Job, prompts: Sequence[Prompt], folder: Path, sampling: Sampling, num_processes: int
) -> Iterator[Progress]:
    """What `sample` does, in so many processes of their own, which outlive this one; yields once a second.

    Raises:
        RuntimeError: they ended early; their last words are in the message.
    """
    if not processes.running(folder):
        with alone(folder, wait=True):  # another kernel's run may be filling it
            pass
    write_job(folder, job, sampling)
    processes.launch(folder, num_processes, "bksdm_utils.pictures")
    for _ in processes.follow(folder):
        yield Progress(min(len(read_manifest(folder)), len(prompts)), len(prompts))


def folder_of(cache_dir: str | Path | None, name: str, model: str, sampling: Sampling) -> Path:
    """Where a model's pictures are kept, so that runs with the same model and settings share them.

    Args:
        cache_dir: None is outputs/cache/pictures.
        model: `model_hash` of the pipeline.
    """
    about = json.dumps({"model": model, **_fixed(sampling)}, sort_keys=True)
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    return Path(cache_dir or ROOT / "outputs" / "cache" / "pictures") / f"{name}-{key}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws a folder of pictures, in as many processes as it is launched in, going on where it stopped."""
    parser = argparse.ArgumentParser(prog="python -m bksdm_utils.pictures", description=__doc__,
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
        _draw_to_the_end(folder, job, sampling)
    except (ValueError, OSError) as error:
        print(f"{processes.LAST_WORDS[0]}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 1
    if PartialState().is_main_process and chosen.config:
        processes.mark_finished(folder)
    return 0


def _given(parameters: Sequence[tuple[str, str]]) -> tuple[Job, Sampling]:
    values = {name: literal(value) for name, value in parameters}
    kinds = [{f.name for f in fields(kind)} for kind in (Job, Sampling)]
    unknown = sorted(set(values) - kinds[0] - kinds[1])
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}: expected {', '.join(sorted(kinds[0] | kinds[1]))}")
    return tuple(kind(**{n: v for n, v in values.items() if n in names})
                 for kind, names in zip((Job, Sampling), kinds, strict=True))  # fmt: skip


def _draw_to_the_end(folder: Path, job: Job, sampling: Sampling) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = PartialState(cpu=device == "cpu")
    prompts = job.read_prompts()
    pipeline, said = job.load(device), -1
    for progress in sample(pipeline, prompts, folder, sampling):
        share = 20 * progress.done // max(1, progress.total)
        if state.is_main_process and share != said:
            print(f"{progress.done}/{progress.total} pictures", flush=True)
            said = share


if __name__ == "__main__":
    sys.exit(main())
