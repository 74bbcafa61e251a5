"""Prompts with ids: from CSV files and from the storybook."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.downloads import DOWNLOADS
from ..data.scenes import SPLITS, Scene, sample_scene
from ..files import ROOT, NotAvailable, resolve

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
    return [Prompt(f"{split}-{i}", sample_scene(i, split).caption) for i in range(num_images)]


def storybook_scene(prompt: Prompt) -> Scene | None:
    """The scene of one of `storybook_prompts`; None for any other prompt."""
    split, _, number = prompt.id.rpartition("-")
    if split not in SPLITS or not number.isdecimal():
        return None
    scene = sample_scene(int(number), split)
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


def not_available(path: Path) -> type[ValueError]:
    """What to raise for a file that is not there: `Missing` for one of `DOWNLOADS`; any other was mistyped."""
    return NotAvailable if ROOT / path in {ROOT / download.path for download in DOWNLOADS.values()} else ValueError


def _table(path: Path) -> tuple[list[dict[str, str]], Sequence[str]]:
    """The rows of a CSV file, and the names of its columns."""
    if not path.is_file():
        raise not_available(path)(f"{path} is missing: expected a CSV file with a column text. COCO's 30,000 captions come "
                             "by python -m bksdm_utils download coco_captions")  # fmt: skip
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
