"""Image-text folders as people have them: tables or .txt files beside the images, subfolders, splits (notebook 03)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

from PIL import Image

from ..config.training import TrainingData
from ..files import in_threads, looked_in
from .examples import EXPECTED, Example, Skipped, captions_of
from .images import IMAGE_SUFFIXES, files_below
from .tables import CAPTIONS, TABLES, choose_column, read_table

OTHER_SPLITS = re.compile(r"(test|testing|eval|evaluation|val|valid|validation|dev)(?![a-z])", re.IGNORECASE)
TABLE_NAMES = tuple(f"metadata{suffix}" for suffix in TABLES)
Row = Example | tuple[str, str]  # or (name, reason) of what is set aside


def folder_rows(folder: Path, config: TrainingData) -> Iterator[Row]:
    """The examples of an image-text folder, and (name, reason) of every row and image that is not used.

    Read are, as the "imagefolder" of Hugging Face's datasets has them: metadata.csv, .jsonl or .parquet in the folder
    or below it, whose names are relative to it; else a .txt beside each image. Where there is a folder train, only that
    is read.

    Raises:
        ValueError: the folder is missing, or is none of these.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} could not be opened (No such folder; {looked_in(folder)}): expected {EXPECTED}")
    files, other_splits = _training_files(folder)
    tables, images = table_files(files), [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if tables:
        rows = _table_rows(folder, tables, images, config)
    elif captioned := [image for image in images if image.with_suffix(".txt").exists()]:
        rows = _text_rows(folder, captioned, images)
    else:
        raise ValueError(_none_of_these(folder, files))
    yield from (_set_aside(folder, file, "of another split than train") for file in other_splits)
    yield from rows


def table_files(files: Sequence[Path]) -> list[Path]:
    """Those that are tables of captions.

    Raises:
        ValueError: a folder has two of them.
    """
    tables = [file for file in files if file.name in TABLE_NAMES]
    for table, following in zip(tables, tables[1:], strict=False):
        if table.parent == following.parent:
            raise ValueError(f"{table.parent} has {table.name} and {following.name}: keep the one that counts")
    return tables


def _training_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of the split train, or all where there are no splits; and images of other splits."""
    files, has_tables = list(files_below(folder)), any((folder / name).exists() for name in TABLE_NAMES)
    train = next((place for name in ("train", "training") if (place := folder / name).is_dir()), None)
    if train and not has_tables:
        inside = [file for file in files if file.is_relative_to(train)]
        outside = [file for file in files if not file.is_relative_to(train)]
    else:
        outside = [file for file in files if OTHER_SPLITS.fullmatch(file.relative_to(folder).parts[0])]
        inside = [file for file in files if file not in set(outside)]
    return inside, [file for file in outside if file.suffix.lower() in IMAGE_SUFFIXES]


def _table_rows(
    folder: Path, tables: Sequence[Path], images: Sequence[Path], config: TrainingData
) -> Iterator[Row]:  # fmt: skip
    named = set()
    for path in tables:
        table = read_table(path)
        image = choose_column(table.columns, config.image_column, ("file_name",), path, "image_column")
        caption = choose_column(table.columns, config.caption_column, CAPTIONS, path, "caption_column")
        yield from table.set_aside
        pairs = [(str(row[image] or "").strip(), row[caption]) for _, row in table.rows]
        if path.parent == folder:
            others = [name for name, _ in pairs if OTHER_SPLITS.fullmatch(Path(name).parts[0] if name else "")]
            yield from ((name, "of another split than train") for name in others)
            pairs = [pair for pair in pairs if pair[0] not in set(others)]
        named |= {path.parent / _slashed(name) for name, _ in pairs}
        yield from in_threads(partial(_table_example, folder, path.parent), pairs)  # reads each file, for its hash
    yield from (_set_aside(folder, image, "no table names it") for image in images if image not in named)


def _slashed(name: str) -> str:
    return name if "/" in name else name.replace("\\", "/")  # written on Windows


def _table_example(folder: Path, beside: Path, pair: tuple[str, object]) -> Row:
    name, caption = pair
    try:
        # By its name alone: a link within the folder may lead anywhere, as in the hub's cache.
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError("the file name is empty or points outside the folder")
        path = beside / name if (beside / name).exists() else beside / _slashed(name)
        return _example(folder, path, captions_of(caption))
    except (OSError, ValueError) as error:
        return name or "(no name)", getattr(error, "strerror", None) or str(error)


def _text_rows(folder: Path, captioned: Sequence[Path], images: Sequence[Path]) -> Iterator[Row]:
    yield from in_threads(partial(_text_example, folder), captioned)
    without = [image for image in images if image not in set(captioned)]
    yield from (_set_aside(folder, image, f"no {image.stem}.txt beside it") for image in without)


def _text_example(folder: Path, image: Path) -> Row:
    try:
        text = image.with_suffix(".txt").read_text(encoding="utf-8-sig")
        return _example(folder, image, captions_of(" ".join(text.split())))
    except UnicodeDecodeError:
        return _set_aside(folder, image, "its .txt is not UTF-8: save it in that encoding")
    except (OSError, ValueError) as error:
        return _set_aside(folder, image, getattr(error, "strerror", None) or str(error))


def _example(folder: Path, path: Path, captions: tuple[str, ...]) -> Example:
    key = sha256(path.read_bytes()).hexdigest()
    return Example(path.relative_to(folder).as_posix(), captions, partial(Image.open, path), key)


def _set_aside(folder: Path, path: Path, reason: str) -> tuple[str, str]:
    return path.relative_to(folder).as_posix(), reason


def _none_of_these(folder: Path, files: Skipped) -> str:
    some = ", ".join(file.relative_to(folder).as_posix() for file in files[:5]) or "nothing"
    return (f"{folder} has no captions: looked for {', '.join(TABLE_NAMES)} in it, in train/ and in other subfolders, "
            f"for a .txt beside each image, and for .parquet and .tar files; there is {some}"
            f"{f' and {len(files) - 5} more' if len(files) > 5 else ''}. Expected {EXPECTED}")  # fmt: skip
