"""Prompts with ids: from CSV files and from the storybook (notebook 04)."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.downloads import DOWNLOADS
from ..data.scenes import SPLITS, Scene, sample_scene
from ..files import ROOT, NotAvailable, resolve

TEXT_COLUMNS, ID_COLUMNS = ("text", "prompt", "caption"), ("id", "file_name")
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|bmp)$", re.IGNORECASE)
ID = re.compile(r"[\w+=-][\w.+=-]*")
ID_BYTES = 150  # file systems allow 255


@dataclass(frozen=True)
class Prompt:
    """What an image shall show; its id names the file and, with the run's seed, gives the noise."""

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

    COCO's metadata.csv is such a file: COCO_val2014_000000000042.jpg gives the id COCO_val2014_000000000042.
    Rows without a text are set aside, and their number is printed.

    Args:
        num_images: reads until so many rows have a text; None reads all.

    Raises:
        NotAvailable: COCO's captions, not downloaded yet.
        ValueError: no such file, no such columns, no prompts, or ids that cannot name files.
    """
    path = find_data(path, "a CSV file with a column text. COCO's: python -m bksdm_utils download coco_captions")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    text, name = (next((c for c in names if c in columns), None) for names in (TEXT_COLUMNS, ID_COLUMNS))
    if text is None:
        raise ValueError(f"{path} has the columns {', '.join(columns)}: expected one of {', '.join(TEXT_COLUMNS)}")
    prompts, without = [], []
    for i, row in enumerate(rows):
        if len(prompts) == num_images:
            break
        id = (row[name] or "").strip() if name else str(i)
        prompt = Prompt(IMAGE_FILE.sub("", id) if name == "file_name" else id, (row[text] or "").strip())
        prompts.append(prompt) if prompt.text else without.append(i + 1)
    if without:
        print(f"{path.name}: {len(without)} rows without a text set aside, such as row {without[0]}")
    check_prompts(prompts, str(path))
    return prompts


def find_data(path: str | Path, expected: str) -> Path:
    """A file or folder; where it is missing raises NotAvailable for one of `DOWNLOADS`, ValueError for any other."""
    path = Path(resolve(path))
    if not path.exists():
        known = ROOT / path in {ROOT / download.path for download in DOWNLOADS.values()}
        raise (NotAvailable if known else ValueError)(f"{path} is missing: expected {expected}")
    return path


def check_prompts(prompts: Sequence[Prompt], source: str = "prompts") -> None:
    """Raises ValueError, naming the first few, for ids that cannot name files, ids twice, empty texts or no prompts."""
    if not prompts:
        raise ValueError(f"{source}: no prompts. Give at least one row with a text")
    number = Counter(prompt.id.casefold() for prompt in prompts)  # some file systems take A for a
    usable = {prompt.id for prompt in prompts if ID.fullmatch(prompt.id) and len(prompt.id.encode()) <= ID_BYTES}
    faults = {
        "an id twice": [p.id for p in prompts if number[p.id.casefold()] > 1],
        "an id that cannot name a file": [p.id for p in prompts if p.id not in usable],
        "no text": [p.id for p in prompts if not p.text],
    }
    for fault, ids in faults.items():
        if ids:
            raise ValueError(f"{source}: {fault} in {len(ids)} rows, such as {', '.join(map(repr, ids[:3]))}. Each row "
                             f"has a text and an id of its own: letters, digits, . _ + - =, {ID_BYTES} bytes at "
                             "most")  # fmt: skip
