"""Files and folders: where things are, atomic writes, locks, disk space, logs. Imports nothing heavy."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.ckpt)")


class NotAvailable(ValueError):
    """Weights or data that are not on this machine; the message says how to get them."""


def resolve(path: str | Path) -> str:
    """A path, also when given relative to the repository's root; what does not exist is taken for a hub id."""
    return next((str(place) for place in places(path) if os.path.exists(place)), str(path))


def places(path: str | Path) -> list[Path]:
    """Where `resolve` looks for a path: from the working directory and, if it is relative, from the repository."""
    path = Path(path).expanduser()
    return list(dict.fromkeys([path, ROOT / path]))


def is_hub_id(path: str | Path) -> bool:
    """Whether a text is name/model of the Hugging Face hub: no existing path, nor one in an existing folder."""
    if not HUB_ID.fullmatch(str(path)) or os.path.exists(resolve(path)):
        return False
    return not any(place.parent.is_dir() for place in places(path))


def looked_in(path: str | Path) -> str:
    """For errors: where a path was looked for, and the last folder on the way that exists."""
    absolute = dict.fromkeys(str(place.absolute()) for place in places(path))
    found = next(parent for parent in Path(path).expanduser().absolute().parents if os.path.exists(parent))
    return f"looked for {' and '.join(absolute)}; {found} exists"


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def write_json(path: Path, content: object) -> None:
    """Writes JSON under a temporary name and renames it, so that no half-written file ever has the name."""
    part = path.with_suffix(".part")
    text = json.dumps(_plain(content), indent=1, default=str, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def link(source: Path, target: Path) -> None:
    """Links a folder by a relative path, so that both may be moved together; copies it where the disk has no links."""
    try:
        os.symlink(os.path.relpath(source.resolve(), target.parent.resolve()), target, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)


def check_disk(folder: Path, need: int, what: str) -> None:
    """Raises ValueError where `folder`'s disk has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{what}: {need / 1e9:.1f} GB needed, {folder} has {free / 1e9:.1f} GB free. Make room.")


def _plain(content: object) -> object:
    """NaN and infinity, which JSON does not have, become null."""
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
        self.main = is_main_process()
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
        with path.open(mode, newline="", encoding="utf-8") as file:
            if rows:
                writer = csv.DictWriter(file, rows[0])
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)


def read_log(path: Path) -> list[dict[str, float]]:
    """The whole rows of a log, also of one that is being written; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        whole = [row for row in csv.DictReader(file) if all(row.values())]  # a kill may cut the last one short
    return [{name: float(value) for name, value in row.items()} for row in whole]


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Within the block no other run writes to `folder`; the system lifts the lock when this process dies.

    Of several processes of one run the main one holds it.

    Args:
        wait: wait for another run that holds it, and say so: for caches that runs share.

    Raises:
        ValueError: another run holds it, and `wait` is False.
    """
    if not is_main_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A singleton of all threads: one process may take it again within itself.
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


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` once everything in it is written.

    Raises:
        ValueError: `folder` exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists already: name another folder, or remove it first")
        part.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): name a folder of your own") from error
    try:
        yield part
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
