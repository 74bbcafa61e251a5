"""Notebooks run headlessly, one after another."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import ROOT
from .parameters import LISTS, NOTEBOOKS, check_parameters, find_notebook, literal, parameters_of
from .run import run_name


@dataclass(frozen=True)
class Job:
    """One notebook with one set of parameter values."""

    notebook: Path
    parameters: dict[str, object]
    dir: Path


def plan_jobs(notebooks: Sequence[str], parameters: Sequence[tuple[str, str]]) -> list[Job]:
    """Every notebook with every combination of swept values.

    Raises:
        ValueError: an unknown notebook, parameter, preset or variant; nothing has run then.
    """
    choices = {
        name: [None if v.lower() == "none" else v for v in values.split(";")]
        if name in LISTS
        else [literal(v) for v in values.split(",")]
        for name, values in parameters
    }
    paths = [find_notebook(name) for name in notebooks] if "all" not in notebooks else _all_notebooks(choices)
    swept = [name for name, values in choices.items() if len(values) > 1]
    jobs, several = [], len(paths) > 1 or any(len(values) > 1 for values in choices.values())
    for path, values in itertools.product(paths, itertools.product(*choices.values())):
        given = dict(zip(choices, values, strict=True))
        check_parameters(path, given)
        jobs.append(Job(path, given, _job_dir(path, given, swept, several)))
    return jobs


def _all_notebooks(needed: Iterable[str]) -> list[Path]:
    """Every notebook that knows all the parameters given."""
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    chosen = [path for path in paths if set(needed) <= set(parameters_of(path))]
    if not chosen:
        raise ValueError(f"no notebook knows all of {', '.join(needed)}: see papermill --help-notebook NOTEBOOK")
    return chosen


def _job_dir(path: Path, given: Mapping[str, object], swept: Sequence[str], several: bool) -> Path:
    """One job may name its folder; several get folders of their own below it."""
    root = Path(str(given["output_dir"])).resolve() if given.get("output_dir") else None
    if root and not several:
        return root
    return (root or ROOT / "outputs") / path.stem / run_name({**parameters_of(path), **given}, swept)


def execute(job: Job) -> tuple[str, float, str]:
    """Runs one job; returns (status, seconds, key figure). The executed notebook is kept also when it fails."""
    import papermill

    job.dir.mkdir(parents=True, exist_ok=True)
    executed, started = job.dir / job.notebook.name, time.perf_counter()
    names = parameters_of(job.notebook)
    parameters = {**job.parameters, **({"output_dir": str(job.dir)} if "output_dir" in names else {})}
    for old in (job.dir / "result.json", executed, executed.with_suffix(".html")):
        old.unlink(missing_ok=True)
    status, figure = "ok", ""
    try:
        papermill.execute_notebook(
            str(job.notebook), str(executed), parameters=parameters, cwd=str(NOTEBOOKS), kernel_name="python3",
            progress_bar=False, stdout_file=sys.stdout, stderr_file=sys.stderr,
        )  # fmt: skip
        figure = json.loads((job.dir / "result.json").read_text())["metrics"]["key_figure"]
    except Exception as error:  # whatever a notebook raises, the runs after it still get their turn
        status, figure = "FAILED", _last_line(error)
    seconds = time.perf_counter() - started
    try:
        _write_html(executed)
    except Exception as error:  # a page that cannot be written is no reason to stop either
        print(f"no .html for {job.notebook.stem}: {_last_line(error)}", flush=True)
    return status, seconds, figure


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _write_html(notebook: Path) -> None:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_filename(str(notebook))
    notebook.with_suffix(".html").write_text(body, encoding="utf-8")


def run_jobs(jobs: Sequence[Job]) -> int:
    """Runs the jobs one after another, prints a table, returns how many failed."""
    rows, total = [], 0.0
    for number, job in enumerate(jobs, 1):
        told = ", ".join(f"{k}={v}" for k, v in job.parameters.items())
        print(f"\n[{number}/{len(jobs)}] {job.notebook.stem} {told}", flush=True)
        status, seconds, figure = execute(job)
        total += seconds
        rows.append((f"{job.notebook.stem}/{job.dir.name}", status, f"{seconds:.0f} s", figure))
        print(f"[{number}/{len(jobs)}] {status} after {seconds:.0f} s", flush=True)
    print_table(("run", "status", "time", "key figure"), rows)
    print(f"\n{len(rows)} runs in {total:.0f} s of notebook time; pictures and .html are in outputs/")
    return sum(row[1] != "ok" for row in rows)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as their widest entry."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    print()
    for row in (header, ["-" * w for w in widths], *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0 when every run succeeded, 1 when one failed, 2 when nothing could run."""
    parser = argparse.ArgumentParser(prog="python -m bksdm_utils.workbook.headless", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("notebooks", nargs="+", help='"all", or numbers, names or paths of notebooks')
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    chosen = parser.parse_args(arguments)
    try:
        jobs = plan_jobs(chosen.notebooks, chosen.parameter)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if run_jobs(jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
