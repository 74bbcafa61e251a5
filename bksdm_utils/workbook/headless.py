"""Notebooks run headlessly, with every combination of swept values, and their pages, which need no network."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_origin

import nbformat

from ..config.base import Config, is_text, kind_of
from ..files import ROOT
from .parameters import CLASSES, NOTEBOOKS, find_notebook
from .protection import check_folder
from .run import fill, run_name

FORMULA = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL
)
MONOSPACE = ".jp-RenderedMarkdown pre { font-family: monospace; }"  # which the template leaves proportional
QUESTION = re.compile(r"\*\*(.+?\?)\*\*")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>BK-SDM workbook: executed notebooks</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
article {{ display: flex; gap: 1.5rem; padding: 1rem 0; border-top: 1px solid #ddd; }}
article div {{ flex: 1; }} article img {{ width: 16rem; height: 10rem; object-fit: contain; object-position: top; }}
h2 {{ font-size: 1.1rem; margin: 0; }} p {{ margin: .3rem 0; }} .run {{ color: #666; font-size: .85rem; }}
</style></head><body><h1>BK-SDM workbook: executed notebooks</h1>
{entries}
</body></html>
"""


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

    try:
        check_folder(fill(find_notebook(job.notebook.stem)[1], job.parameters), job.dir)
    except ValueError as error:  # before the earlier run's pages are touched
        return "REFUSED", 0.0, str(error)
    job.dir.mkdir(parents=True, exist_ok=True)
    executed, started = job.dir / job.notebook.name, time.perf_counter()
    for old in (job.dir / "result.json", executed, executed.with_suffix(".html")):
        old.unlink(missing_ok=True)
    status, figure = "ok", ""
    try:
        papermill.execute_notebook(
            str(job.notebook), str(executed), parameters={**job.parameters, "output_dir": str(job.dir)},
            cwd=str(NOTEBOOKS), kernel_name="python3", progress_bar=False, stdout_file=sys.stdout,
            stderr_file=sys.stderr, extra_arguments=["--log-level=ERROR"], start_timeout=600,  # on a busy machine
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


def with_mathml(markdown: str) -> str:
    """Markdown with its TeX formulas as MathML, which browsers show without a network; code stays as it is."""
    from latex2mathml.converter import convert

    def formula(match: re.Match) -> str:
        tex = match["block"] or match["inline"]
        if tex is None:
            return match[0]
        mathml = convert(tex.strip(), display="block" if match["block"] else "inline")
        return mathml.replace("|", "&#x7C;").replace("*", "&#x2A;").replace("_", "&#x5F;")

    return FORMULA.sub(formula, markdown)


def write_page(notebook: Path) -> Path:
    """Writes an executed notebook as .html beside it."""
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
    body, _ = HTMLExporter().from_notebook_node(content, {"metadata": {"name": notebook.stem}})
    page = notebook.with_suffix(".html")
    # The template's scripts are fetched, and not needed: formulas are MathML, widgets have a static figure beside them.
    body = body.replace("</head>", f"<style>{MONOSPACE}</style></head>", 1)
    page.write_text(re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL), encoding="utf-8")
    return page


def write_index(outputs: Path = ROOT / "outputs") -> Path:
    """Writes index.html: every executed notebook below `outputs` with its question, key figure and one image."""
    pages = sorted(path for path in outputs.glob("*/*/*.html") if path.stem == path.parent.parent.name)
    index = outputs / "index.html"
    index.write_text(PAGE.format(entries="\n".join(_entry(page, outputs) for page in pages)), encoding="utf-8")
    return index


def _entry(page: Path, outputs: Path) -> str:
    first = nbformat.read(page.with_suffix(".ipynb"), as_version=4).cells[0].source
    question, result, figure = QUESTION.search(first), page.parent / "result.json", "did not finish"
    if result.is_file():
        figure = json.loads(result.read_text(encoding="utf-8"))["metrics"]["key_figure"]
    images = sorted(page.parent.glob("*.png"), key=lambda path: path.stat().st_mtime)
    link = html.escape(os.path.relpath(page, outputs))
    image = f'<img src="{html.escape(os.path.relpath(images[-1], outputs))}" alt="">' if images else ""
    title = html.escape(first.splitlines()[0].removeprefix("# "))
    parts = [f'<h2><a href="{link}">{title}</a></h2>', f"<p>{html.escape(question[1]) if question else ''}</p>",
             f"<p>{html.escape(figure)}</p>", f'<p class="run">{html.escape(page.parent.name)}</p>']  # fmt: skip
    return f"<article><div>{''.join(parts)}</div>{image}</article>"
