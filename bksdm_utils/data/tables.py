"""Tables as people have them: every line is read, mended where that is unambiguous, or set aside by its number."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import resolve

CAPTIONS = ("text", "prompt", "caption", "txt")  # columns that may hold a caption, where none is named
FIELD_BYTES = 131_072  # the longest field that csv reads


@dataclass(frozen=True)
class Table:
    """A table from a file.

    Attributes:
        rows: (number of its line, column -> value) of every row that could be read; values of CSV files are texts.
        set_aside: ("line 7", reason) of the others.
    """

    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, object]]]
    set_aside: list[tuple[str, str]]


def read_table(path: str | Path) -> Table:
    """Reads a file of one of `TABLES`; raises ValueError where it is damaged or something else."""
    return TABLES[Path(path).suffix](path)


def read_csv(path: str | Path) -> Table:
    """Reads a UTF-8 file with a header, separated by commas, or by the semicolons or tabs that the header has.

    A quote that is not closed costs its own line, not the rest. In a file of two columns the second may hold commas
    without quotes.

    Raises:
        ValueError: the file is not text in UTF-8, or has no header.
    """
    path = Path(resolve(path))
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:1000]:
        raise ValueError(f"{path} is not text in UTF-8 (UTF-16, or no text at all): save it as CSV in UTF-8")
    lines = content.decode("utf-8", errors="surrogateescape").splitlines(keepends=True)
    if not lines or not lines[0].strip():
        raise ValueError(f"{path} has no header: expected a first line such as file_name,text")
    delimiter = next((d for d in ",;\t" if d in lines[0]), ",")
    columns = tuple(name.strip() for name in _fields(lines[0], delimiter) or [lines[0]])
    rows, set_aside = [], []
    for number, text in _records(lines, delimiter, len(columns)):
        row = _row(text, delimiter, columns)
        rows.append((number, row)) if isinstance(row, dict) else set_aside.append((f"line {number}", row))
    return Table(columns, rows, set_aside)


def _fields(text: str, delimiter: str) -> list[str] | None:
    """The fields of one record; None where a quote is open at its end, or other text follows a closed one."""
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None


def _records(lines: Sequence[str], delimiter: str, width: int) -> Iterator[tuple[int, str]]:
    """(line number, text) of every record after the header; one may go over several lines within quotes."""
    at = 1
    while at < len(lines):
        end = at + 1
        if _fields(lines[at], delimiter) is None:
            end = _closing(lines, at, delimiter, width)
        if lines[at].strip():
            yield at + 1, "".join(lines[at:end])
        at = end


def _closing(lines: Sequence[str], at: int, delimiter: str, width: int) -> int:
    """The line after a record that begins at line `at` with an open quote; `at + 1` where it is never closed.

    A line that is a whole row by itself cannot be part of it: then the quote was forgotten.
    """
    size = len(lines[at])
    for end in range(at + 1, len(lines)):
        size += len(lines[end])
        fields = _fields(lines[end], delimiter)
        if size > FIELD_BYTES or (fields and len(fields) == width > 1 and '"' not in lines[end]):
            break
        if _fields("".join(lines[at : end + 1]), delimiter) is not None:
            return end + 1
    return at + 1


def _row(text: str, delimiter: str, columns: Sequence[str]) -> dict[str, str] | str:
    """A record as column -> text, or why it is none."""
    if not text.isprintable() and any("\udc80" <= c <= "\udcff" for c in text):
        return "not UTF-8: save the file in that encoding"
    fields = _fields(text, delimiter)
    if fields is None:
        return "a quote that is not closed, or text after a closed one"
    if len(fields) > len(columns) == 2 and '"' not in text:  # the rest of the line is the caption
        fields = text.rstrip("\r\n").split(delimiter, 1)
    if len(fields) > len(columns):
        return f"{len(fields)} fields, the header has {len(columns)}: put texts with a {delimiter!r} in quotes"
    return dict(zip(columns, fields + [""] * (len(columns) - len(fields)), strict=True))


def read_jsonl(path: str | Path) -> Table:
    """Reads a file with one JSON object in every line; raises ValueError where no line is one."""
    lines = enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1)
    parsed = [(number, _json_row(line)) for number, line in lines if line.strip()]
    rows = [(number, row) for number, row in parsed if isinstance(row, dict)]
    set_aside = [(f"line {number}", row) for number, row in parsed if isinstance(row, str)]
    if not rows:
        raise ValueError(f'{path} has no line such as {{"file_name": "0.png", "text": "a cat"}} {set_aside[:1]}')
    columns = tuple(dict.fromkeys(name for _, row in rows for name in row))
    return Table(columns, [(number, dict.fromkeys(columns) | row) for number, row in rows], set_aside)


def _json_row(line: bytes) -> dict[str, object] | str:
    """A line's object, or why it is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError as error:
        return f"not JSON in UTF-8: {error}"
    return value if isinstance(value, dict) else f"a {type(value).__name__} instead of an object"


def read_parquet(path: str | Path) -> Table:
    """Reads a Parquet file; raises ValueError where it is none."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} could not be read ({error}): expected a Parquet file") from error
    return Table(tuple(table.column_names), list(enumerate(table.to_pylist(), 1)), [])


TABLES = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def choose_column(
    columns: Sequence[str], named: str | None, usual: Sequence[str], source: object, parameter: str = ""
) -> str:
    """The column that is named, or the only one of the usual names.

    Raises:
        ValueError: it does not exist, or several could be meant.
    """
    found = [name for name in ([named] if named else usual) if name in columns]
    if len(found) == 1:
        return found[0]
    expected = f"one of {' and '.join(found)} alone" if found else f"{named or ' or '.join(usual)}"
    advice = f", or another that {parameter} names" if parameter else ""
    raise ValueError(f"{source} has the columns {', '.join(columns)}: expected {expected}{advice}")
