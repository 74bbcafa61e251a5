"""Prompts with ids: from CSV files and from the storybook (notebook 04)."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.downloads import DOWNLOADS
from ..data.scenes import SPLITS, Scene, sample_scene
from ..data.tables import CAPTIONS, choose_column, read_csv
from ..files import ROOT, NotAvailable, looked_in, resolve

ID_COLUMNS = ("id", "file_name")
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|bmp)$", re.IGNORECASE)
ID = re.compile(r"[\w+=-][\w.+=-]*")
ID_BYTES = 150  # file systems allow 255


@dataclass(frozen=True)
class Prompt:
    """What an image shall show; its id names the file and, with the run's seed, gives the noise."""

    id: str
    text: str


class Prompts(list):
    """Prompts from a file; `set_aside` has (line, reason) of its rows that are none."""

    set_aside: Sequence[tuple[str, str]] = ()


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


def read_prompts(path: str | Path, num_images: int | None = None) -> Prompts:
    """Prompts from a CSV file: text from the column text, prompt or caption, ids from id or file_name, or row numbers.

    COCO's metadata.csv is such a file: COCO_val2014_000000000042.jpg gives the id COCO_val2014_000000000042.
    Rows that cannot be read or have no text are set aside, and their number is printed.

    Args:
        num_images: reads until so many rows have a text; None reads all.

    Raises:
        NotAvailable: COCO's captions, not downloaded yet.
        ValueError: no such file, no such columns, no prompts, or ids that cannot name files.
    """
    path = find_data(path, "a CSV file with a column text. COCO's: python -m bksdm_utils download coco_captions")
    table = read_csv(path)
    text = choose_column(table.columns, None, CAPTIONS, path)
    name = next((c for c in ID_COLUMNS if c in table.columns), None)
    prompts, set_aside = Prompts(), list(table.set_aside)
    for i, (line, row) in enumerate(table.rows):
        if len(prompts) == num_images:
            break
        id = row[name].strip() if name else str(i)
        prompt = Prompt(IMAGE_FILE.sub("", id) if name == "file_name" else id, row[text].strip())
        prompts.append(prompt) if prompt.text else set_aside.append((f"line {line}", "no text"))
    if set_aside and not prompts:
        raise ValueError(f"{path}: no prompts. {': '.join(set_aside[0])}")
    if set_aside:
        print(f"{path.name}: {len(set_aside)} rows set aside, such as {set_aside[0][0]}: {set_aside[0][1]}")
    prompts.set_aside = set_aside
    check_prompts(prompts, str(path))
    return prompts


def find_data(path: str | Path, expected: str) -> Path:
    """A file or folder; where it is missing raises NotAvailable for one of `DOWNLOADS`, ValueError for any other."""
    path = Path(resolve(path))
    if not os.path.exists(path):
        known = ROOT / path in {ROOT / download.path for download in DOWNLOADS.values()}
        raise (NotAvailable if known else ValueError)(f"{path} is missing ({looked_in(path)}): expected {expected}")
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
