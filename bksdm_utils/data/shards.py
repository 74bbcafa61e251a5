"""Shards and data sets of the hub, as tables of `datasets` (notebook 03)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from glob import escape, glob
from pathlib import Path

from ..config.training import TrainingData
from ..files import looked_in, resolve
from .examples import EXPECTED, Example, captions_of
from .folders import OTHER_SPLITS, TABLE_NAMES
from .images import open_image
from .tables import CAPTIONS, choose_column

SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
IMAGES = ("image", "jpg", "jpeg", "png", "webp")  # columns that may hold the images; those of .tar are suffixes


def shard_files(source: str | Path) -> list[str]:
    """The .parquet or .tar files of a folder, its data/ or train/, or of a pattern such as `shards/*.tar`, sorted.

    Where their names tell splits (train-00000-of-00002.parquet), those of the split train. None where the folder has a
    table of captions: then it is an image-text folder, whatever archive lies beside.

    Raises:
        ValueError: there are both kinds, which do not belong together.
    """
    path = Path(resolve(source))
    if not os.path.isdir(path):
        return _shards(map(Path, glob(os.path.join(escape(str(path.parent)), path.name))))
    if any((path / name).exists() for name in TABLE_NAMES):
        return []
    return next((files for place in (path, path / "data", path / "train") if (files := _shards(place.glob("*")))), [])


def _shards(candidates: Iterable[Path]) -> list[str]:
    files = sorted(file for file in candidates if file.suffix in SHARDS and file.name not in TABLE_NAMES)
    training = [file for file in files if not OTHER_SPLITS.match(file.name)]
    archives = [file for file in training if file.suffix == ".tar"]
    tables = {file.stem for file in training if file.suffix == ".parquet"}
    if archives and tables - {file.stem for file in archives}:
        raise ValueError(f"{files[0].parent} has both .tar and .parquet files: name one kind, as in shards/*.tar")
    return [str(file) for file in archives or training]  # img2dataset writes a .parquet of facts beside each .tar


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
        raise ValueError(f"{source} could not be opened ({error}; {looked_in(source)}): expected {EXPECTED}") from error
    columns = table.column_names or (config.image_column or "image", config.caption_column or "text")
    image = choose_column(columns, config.image_column, IMAGES, source, "image_column")
    caption = choose_column(columns, config.caption_column, CAPTIONS, source, "caption_column")
    renamed = {old: new for old, new in ((image, "image"), (caption, "text")) if old != new}
    # Cast first: renaming a stream decodes it, and one broken image would end it.
    table = table.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
    return table.rename_columns(renamed)


def table_rows(config: TrainingData) -> Iterator[Example | tuple[str, str]]:
    """As `folder_rows`, of a table that `datasets` keeps on disk."""
    table = open_table(config, streaming=False)
    for i, value in enumerate(table["text"]):
        try:
            yield Example(f"row {i}", captions_of(value), lambda i=i: open_image(table[i]["image"]),
                          f"{table._fingerprint}-{i}")  # fmt: skip
        except ValueError as error:
            yield f"row {i}", str(error)
