"""Notebooks run headlessly, one after another, with every combination of swept values."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_origin

from ..config.base import Config, is_text, kind_of
from ..files import ROOT
from .parameters import CLASSES, NOTEBOOKS, find_notebook
from .run import fill, run_name


@dataclass(frozen=True)
class Job:
    """One notebook with one set of parameter values."""

    notebook: Path
    parameters: dict[str, object]
    dir: Path


def plan_jobs(
    notebooks: Sequence[str], parameters: Mapping[str, object], sweep: Mapping[str, Sequence[object]] | None = None
) -> list[Job]:
    """Every notebook with every combination of swept values; nothing has run when this raises.

    Args:
        notebooks: numbers, names or paths; "all" stands for every notebook that has all the parameters.
        parameters: name -> value. A comma sweeps a parameter whose values can hold none (numbers, switches, words),
            variant and preset among them.
        sweep: name -> values.

    Raises:
        ValueError: an unknown notebook or parameter, or a value that does not fit.
    """
    names = [*parameters, *(sweep or {})]
    if "all" in notebooks:
        notebooks = [number for number, kind in CLASSES.items() if set(names) <= set(kind.model_fields)]
    if not notebooks:
        raise ValueError(f"no notebook has all of {', '.join(names)}: see bksdm run NOTEBOOK --help")
    jobs = []
    for path, kind in map(find_notebook, notebooks):
        choices = {name: _values(kind, name, value) for name, value in parameters.items()}
        choices |= {name: list(dict.fromkeys(values)) for name, values in (sweep or {}).items()}
        swept = [name for name, values in choices.items() if len(values) > 1]
        several = len(notebooks) > 1 or bool(swept)
        for values in itertools.product(*choices.values()):
            given = dict(zip(choices, values, strict=True))
            folder = _folder(path, fill(kind, given), swept, several, {job.dir for job in jobs})
            jobs.append(Job(path, given, folder))
    return jobs


def _values(kind: type[Config], name: str, value: object) -> list[object]:
    """The values that `-p name a,b` sweeps; one where a comma may be part of the value."""
    field = kind.model_fields.get(name)
    if not isinstance(value, str) or field is None:
        return [value]
    words = get_origin(kind_of(field)) is Literal or name in ("variant", "preset")
    one = get_origin(kind_of(field)) is tuple or (is_text(field) and not words)
    return [value] if one else list(dict.fromkeys(part.strip() for part in value.split(",")))


def _folder(path: Path, config: Config, swept: Sequence[str], several: bool, used: set[Path]) -> Path:
    """One job may name its folder; several get folders of their own below it, with a number where a name is used."""
    name = run_name(config, swept)  # an unknown variant is an error
    root = Path(config.output_dir).resolve() if config.output_dir else ROOT / "outputs"
    folder = root if config.output_dir and not several else root / path.stem / name
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([folder], numbered) if free not in used)


def execute(job: Job) -> tuple[str, float, str]:
    """Runs one job; returns (status, seconds, key figure). The executed notebook is kept also when it fails."""
    import papermill

    from .pages import write_page  # nbconvert takes a second

    job.dir.mkdir(parents=True, exist_ok=True)
    executed, started = job.dir / job.notebook.name, time.perf_counter()
    for old in (job.dir / "result.json", executed, executed.with_suffix(".html")):
        old.unlink(missing_ok=True)
    status, figure = "ok", ""
    try:
        papermill.execute_notebook(
            str(job.notebook), str(executed), parameters={**job.parameters, "output_dir": str(job.dir)},
            cwd=str(NOTEBOOKS), kernel_name="python3", progress_bar=False, stdout_file=sys.stdout,
            stderr_file=sys.stderr, extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
        figure = json.loads((job.dir / "result.json").read_text(encoding="utf-8"))["metrics"]["key_figure"]
    except Exception as error:  # whatever a notebook raises, the runs after it still take place
        status, figure = "FAILED", _last_line(error)
    seconds = time.perf_counter() - started
    try:
        write_page(executed)
    except Exception as error:  # a page that cannot be written is no reason to stop either
        print(f"no .html for {job.notebook.stem}: {_last_line(error)}", flush=True)
    return status, seconds, figure


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def run_jobs(jobs: Sequence[Job]) -> int:
    """Runs the jobs one after another, prints a table, returns how many failed."""
    from .pages import write_index

    rows, total = [], 0.0
    for number, job in enumerate(jobs, 1):
        values = ", ".join(f"{name}={value}" for name, value in job.parameters.items())
        print(f"\n[{number}/{len(jobs)}] {job.notebook.stem} {values}", flush=True)
        status, seconds, figure = execute(job)
        total += seconds
        rows.append((f"{job.notebook.stem}/{job.dir.name}", status, f"{seconds:.0f} s", figure))
        print(f"[{number}/{len(jobs)}] {status} after {seconds:.0f} s", flush=True)
    print_table(("run", "status", "time", "key figure"), rows)
    print(f"\n{len(rows)} runs in {total:.0f} s of notebook time; all executed notebooks: {write_index()}")
    return sum(row[1] != "ok" for row in rows)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as their widest entry."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    print()
    for row in (header, ["-" * w for w in widths], *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
