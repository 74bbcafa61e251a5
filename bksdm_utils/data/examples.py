"""Training images and their captions: storybook scenes, folders, shards, data sets of the hub (notebook 03)."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..config.training import TrainingData
from ..files import in_threads, resolve
from . import rendering, scenes
from .images import open_image
from .rendering import render
from .scenes import sample_scene

SHARDS = {".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True)
class Example:
    """One picture, opened only when asked for, and its captions; `key` names its content for the cache."""

    name: str
    captions: tuple[str, ...]
    open: Callable[[], Image.Image]
    key: str


Skipped = list[tuple[str, str]]  # (name, reason) of what was set aside


def load_examples(config: TrainingData) -> tuple[list[Example], Skipped]:
    """The training examples of a preset: scenes, an image-text folder, shards, or a data set of the hub.

    Raises:
        ValueError: there is no such folder or data set, it lacks the columns, or nothing in it is usable.
    """
    if config.train_data_dir is None:
        return storybook_examples(config.num_train_scenes), []
    place = config.train_data_dir
    could_be_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place) and not Path(resolve(place)).exists()
    return read_table(config) if shard_files(place) or could_be_hub else read_folder(place)


def read_folder(folder: str | Path) -> tuple[list[Example], Skipped]:
    """An image-text folder: pictures beside a metadata.csv with the columns file_name and text.

    Returns:
        the examples, and (name, reason) of every row set aside.

    Raises:
        ValueError: the folder or its metadata.csv is missing or malformed, or nothing usable is in it.
    """
    folder = Path(resolve(folder))
    rows = _rows(folder / "metadata.csv")
    examples, skipped = [], []
    for example, reason in in_threads(lambda row: _example(folder, row), rows):  # each file is read, for its hash
        if example:
            examples.append(example)
        else:
            skipped.append(reason)
    if not examples:
        raise ValueError(
            f"{folder}: none of {len(rows)} rows is usable (first: {skipped[:1]}). Add pictures and captions."
        )
    return examples, skipped


def _example(folder: Path, row: dict) -> tuple[Example | None, tuple[str, str] | None]:
    name = (row["file_name"] or "").strip()
    try:
        path = _inside(folder, name)
        captions, key = captions_of(row["text"]), _digest(path.read_bytes())
        return Example(name, captions, lambda: Image.open(path), key), None
    except (OSError, ValueError) as error:
        return None, (name or "(no name)", getattr(error, "strerror", None) or str(error))


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("file_name is empty or points outside the folder")
    return path


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.parent.is_dir():
        raise ValueError(
            f"{path.parent} is no folder: expected pictures and a metadata.csv with file_name, text. LAION's comes "
            "by python -m bksdm_utils.data.downloads laion_aes_212k (or _11k, _2256k)"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing: write a CSV file with the columns file_name and text")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        if not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}: expected file_name and text")
        try:
            return list(reader)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}. Look for a quote that is not closed."
            ) from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def shard_files(place: str | Path) -> list[str]:
    """The .parquet or .tar files that a folder holds or a pattern such as `shards/*.tar` matches, sorted."""
    place = Path(resolve(place))
    found = place.glob("*") if place.is_dir() else place.parent.glob(place.name)
    return sorted(str(path) for path in found if path.suffix in SHARDS)


def columns(config: TrainingData) -> tuple[str, str]:
    """The names of a table's columns of images and of captions."""
    return config.image_column or "image", config.caption_column or "text"


def open_table(config: TrainingData, streaming: bool):
    """Shards, or a data set of the hub by name, as HF `datasets` opens them; pictures stay undecoded bytes.

    Returns:
        a Dataset, streamed an IterableDataset, of rows with `image_column` and `caption_column`.
    """
    import datasets  # takes a second; storybook and folders need it not

    files = shard_files(config.train_data_dir)
    kind = SHARDS[Path(files[0]).suffix] if files else str(config.train_data_dir)
    try:
        table = datasets.load_dataset(kind, data_files=files or None, split="train", streaming=streaming)
    except Exception as error:  # no such data set, no network, a broken shard: each has a class of its own
        raise ValueError(
            f"{config.train_data_dir} cannot be opened ({error}): expected a folder with a metadata.csv of file_name, "
            "text; a folder or pattern of .parquet or .tar shards; or the name of a data set on the Hugging Face hub "
            "(which needs a network). LAION's folders come by python -m bksdm_utils.data.downloads laion_aes_212k"
        ) from error
    needed = list(columns(config))
    missing = set(needed) - set(table.column_names or needed)
    if missing:
        raise ValueError(f"{config.train_data_dir} has the columns {', '.join(table.column_names)}: it lacks "
                         f"{', '.join(sorted(missing))}; name others by image_column and caption_column")  # fmt: skip
    return table.select_columns(needed).cast_column(needed[0], datasets.Image(decode=False))


def read_table(config: TrainingData) -> tuple[list[Example], Skipped]:
    """A whole table of pictures and captions, which `datasets` keeps on disk, as `load_examples` gives it."""
    table, examples, skipped = open_table(config, streaming=False), [], []
    image, caption = columns(config)
    for i, value in enumerate(table[caption]):
        try:
            open_ = lambda i=i: open_image(table[i][image])  # noqa: E731
            examples.append(Example(f"row {i}", captions_of(value), open_, f"{table._fingerprint}-{i}"))
        except ValueError as error:
            skipped.append((f"row {i}", str(error)))
    if not examples:
        raise ValueError(f"{config.train_data_dir}: none of {len(table)} rows is usable (first: {skipped[:1]})")
    return examples, skipped


def captions_of(value: object) -> tuple[str, ...]:
    """One caption or several; ValueError where there is none."""
    texts = [value] if isinstance(value, (str, type(None))) else list(value)
    captions = tuple(text.strip() for text in texts if text and text.strip())
    if not captions:
        raise ValueError("empty caption")
    return captions


def storybook_examples(num_scenes: int, split: str = "train") -> list[Example]:
    """The first scenes of a storybook split."""
    world = _digest(Path(rendering.__file__).read_bytes() + Path(scenes.__file__).read_bytes())
    examples = []
    for seed in range(num_scenes):
        scene = sample_scene(seed, split)
        draw = lambda scene=scene, seed=seed: render(scene, seed)  # noqa: E731
        examples.append(Example(f"{split}-{seed}", (scene.caption,), draw, f"{world}-{split}-{seed}"))
    return examples
