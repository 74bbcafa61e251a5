"""Training images and their captions: storybook scenes, folders, shards, data sets of the hub (notebook 03)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from ..config.training import TrainingData
from ..files import in_threads, resolve
from . import rendering, scenes
from .images import open_image
from .tables import CAPTIONS, choose_column, read_csv

SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
EXPECTED = ("a folder of images with a metadata.csv of the columns file_name, text; a folder or pattern of .parquet or "
            ".tar shards; or the name of a data set on the Hugging Face hub, which needs a network. LAION's folders: "
            "python -m bksdm_utils download laion_aes_212k (or _11k, _2256k)")  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One image, opened when needed, and its captions; `key` identifies its content for the cache."""

    name: str
    captions: tuple[str, ...]
    open: Callable[[], Image.Image]
    key: str


Skipped = list[tuple[str, str]]  # (name, reason) of what was set aside


def load_examples(config: TrainingData) -> tuple[list[Example], Skipped]:
    """The training examples, and what was set aside; ValueError where the source or its columns do not exist."""
    source = config.train_data_dir
    if source is None:
        return storybook_examples(config.num_train_scenes), []
    path = Path(resolve(source))
    could_be_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not path.exists()
    rows = list(_table_rows(config) if shard_files(source) or could_be_hub else _folder_rows(path, config))
    examples = [row for row in rows if isinstance(row, Example)]
    skipped = [row for row in rows if not isinstance(row, Example)]
    if not examples:
        raise ValueError(f"{source}: none of {len(rows)} rows is usable (first: {skipped[:1]}): add images, captions")
    return examples, skipped


def storybook_examples(num_scenes: int, split: str = "train") -> list[Example]:
    """The first scenes of a storybook split."""
    world = sha256(Path(rendering.__file__).read_bytes() + Path(scenes.__file__).read_bytes()).hexdigest()

    def example(seed: int) -> Example:
        scene, name = scenes.sample_scene(seed, split), f"{split}-{seed}"
        return Example(name, (scene.caption,), lambda: rendering.render(scene, seed), f"{world}-{name}")

    return [example(seed) for seed in range(num_scenes)]


def _folder_rows(folder: Path, config: TrainingData) -> Iterator[Example | tuple[str, str]]:
    """The examples of an image-text folder, and (name, reason) for each row that is not usable."""
    path = folder / "metadata.csv"
    try:
        table = read_csv(path)
    except OSError as error:
        raise ValueError(f"{path} could not be opened ({error.strerror}): expected {EXPECTED}") from error
    image = choose_column(table.columns, config.image_column, ("file_name",), path, "image_column")
    caption = choose_column(table.columns, config.caption_column, CAPTIONS, path, "caption_column")
    yield from table.set_aside
    # Each file is read, for its hash.
    yield from in_threads(
        lambda row: _folder_example(folder, row[image].strip(), row[caption]), dict(table.rows).values()
    )


def _folder_example(folder: Path, name: str, caption: str) -> Example | tuple[str, str]:
    path = folder / name
    try:
        # By its name alone: a link within the folder may lead anywhere, as in the hub's cache.
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError("the file name is empty or points outside the folder")
        captions, key = captions_of(caption), sha256(path.read_bytes()).hexdigest()
        return Example(name, captions, lambda: Image.open(path), key)
    except (OSError, ValueError) as error:
        return name or "(no name)", getattr(error, "strerror", None) or str(error)


def captions_of(value: object) -> tuple[str, ...]:
    """The one or several captions in a cell of a table; ValueError where there is none, or something else."""
    texts = list(value) if isinstance(value, (list, tuple)) else [value]
    if wrong := [text for text in texts if not isinstance(text, (str, type(None)))]:
        raise ValueError(f"the caption is {type(wrong[0]).__name__}, not text")
    captions = tuple(text.strip() for text in texts if text and text.strip())
    if not captions:
        raise ValueError("empty caption")
    return captions


def shard_files(source: str | Path) -> list[str]:
    """The .parquet or .tar files that a folder holds or a pattern such as `shards/*.tar` matches, sorted."""
    path = Path(resolve(source))
    files = path.glob("*") if path.is_dir() else path.parent.glob(path.name)
    return sorted(str(file) for file in files if file.suffix in SHARDS)


def open_table(config: TrainingData, streaming: bool):
    """Shards, or a data set of the hub by name, as a `Dataset`, or an `IterableDataset` with `streaming`.

    Its columns are "image", as undecoded bytes, and "text", whatever they are called in the source.
    """
    import datasets  # takes a second; storybook and folders do not need it

    source = config.train_data_dir
    files = shard_files(source)
    kind = SHARDS[Path(files[0]).suffix] if files else source
    try:
        table = datasets.load_dataset(kind, data_files=files or None, split="train", streaming=streaming)
    except Exception as error:  # no such data set, no network, a broken shard: each has a class of its own
        raise ValueError(f"{source} could not be opened ({error}): expected {EXPECTED}") from error
    columns = table.column_names or (config.image_column or "image", config.caption_column or "text")
    image = choose_column(columns, config.image_column, ("image",), source, "image_column")
    caption = choose_column(columns, config.caption_column, CAPTIONS, source, "caption_column")
    renamed = {old: new for old, new in ((image, "image"), (caption, "text")) if old != new}
    # Cast first: renaming a stream decodes it, and one broken image would end it.
    table = table.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
    return table.rename_columns(renamed)


def _table_rows(config: TrainingData) -> Iterator[Example | tuple[str, str]]:
    """As `_folder_rows`, of a table that `datasets` keeps on disk."""
    table = open_table(config, streaming=False)
    for i, value in enumerate(table["text"]):
        try:
            yield Example(f"row {i}", captions_of(value), lambda i=i: open_image(table[i]["image"]),
                          f"{table._fingerprint}-{i}")  # fmt: skip
        except ValueError as error:
            yield f"row {i}", str(error)
