"""Files and folders: where things are, atomic writes, locks, disk space, logs. Imports nothing heavy."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent


class NotAvailable(ValueError):
    """Weights or data that are not on this machine; the message says how to get them."""


def resolve(place: str | Path) -> str:
    """A folder, also when given relative to the repository's root; anything else is taken for a hub id."""
    for candidate in (Path(place), ROOT / place):
        if candidate.exists():
            return str(candidate)
    return str(place)


def is_hub_id(place: str | Path) -> bool:
    """Whether a place looks like name/model of the Hugging Face hub, and is no path that is there."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(place))) and not Path(resolve(place)).exists()


def write_json(path: Path, content: object) -> None:
    """Writes JSON under a temporary name and renames it, so that a half-written file never stands."""
    part = path.with_suffix(".part")
    text = json.dumps(_plain(content), indent=1, default=str, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def check_disk(folder: Path, need: int, what: str) -> None:
    """Raises ValueError where `folder`'s disk has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{what}: {need / 1e9:.1f} GB needed, {folder} has {free / 1e9:.1f} GB free. Make room.")


def _plain(content: object) -> object:
    """NaN, which JSON does not know, becomes null."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class CsvLog:
    """A CSV file of one row per logged step; on resumption rows of steps that are done again are dropped first.

    Of several processes only the main one writes.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_log(path) if row["step"] <= step] if step else []
        self.main = PartialState().is_main_process
        if self.main:
            part = path.with_suffix(".part")
            self._write(part, "w", self.rows)
            os.replace(part, path)

    def append(self, row: dict[str, float]) -> None:
        """Adds one row; all rows have the same columns."""
        self.rows.append(row)
        if self.main:
            self._write(self.path, "a", [row])

    def _write(self, path: Path, mode: str, rows: list[dict]) -> None:
        with path.open(mode, newline="") as file:
            if rows:
                writer = csv.DictWriter(file, rows[0])
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)


def read_log(path: Path) -> list[dict[str, float]]:
    """The whole rows of a log, also of one that is being written; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        whole = [row for row in csv.DictReader(file) if all(row.values())]  # a kill may cut the last one short
    return [{name: float(value) for name, value in row.items()} for row in whole]


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Within the block no other run writes to `folder`; the system lifts the lock when this process dies.

    Of several processes of one run the main one holds it.

    Args:
        wait: where another run holds it, say so and wait for it: of caches that runs share.

    Raises:
        ValueError: another run holds it, and `wait` is False.
    """
    if not PartialState().is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A singleton, of all threads: one process may take it within itself.
    lock = FileLock(folder / ".training.lock", timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        if not wait:
            raise ValueError(f"another run writes to {folder}: wait, stop it, or use another folder") from error
        print(f"another run writes to {folder}: waiting for it", flush=True)
        lock.acquire(timeout=-1, poll_interval=0.5)
    try:
        yield
    finally:
        lock.release()


def in_threads(function: Callable, items: Iterable, ahead: int = 64, workers: int | None = None) -> Iterator:
    """`map` in threads: results in order, at most `ahead` items taken before they are asked for."""
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
