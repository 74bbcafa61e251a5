"""Start and finish of a notebook run, and the command that runs notebooks headlessly.

    python -m bksdm_utils.run 03 -p variant bk_base,bk_small,bk_tiny -p max_train_steps 200
    python -m bksdm_utils.run all

A value with commas is swept; every combination is one run. Of a parameter that is a list itself, such as few_steps,
semicolons divide what is swept. Unknown parameters, presets and variants are refused.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .presets import PRESETS, ROOT, Missing, Preset, find_preset

if TYPE_CHECKING:  # importing it for real takes seconds that the command line need not wait for
    from .surgery import RemovalPlan

NOTEBOOKS = ROOT / "notebooks"
# Parameters that are lists: a comma is part of one value.
LISTS = ("students", "guidances", "models", "methods", "lora_targets", "lora_text_targets", "few_steps", "formats",
         "trackers")  # fmt: skip


# --- what a notebook may be told --------------------------------------------------------------------------------------


def find_notebook(name: str) -> Path:
    """A notebook by path, file name, full stem or number: "03" is notebooks/03_kd_training.ipynb."""
    known = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    for path in known:
        if name in (path.stem, path.name, path.stem.split("_")[0]) or Path(name).resolve() == path:
            return path
    raise ValueError(f"unknown notebook {name!r}: expected all or one of {', '.join(p.stem for p in known)}")


def parameters_of(notebook: Path) -> dict[str, object]:
    """The names and default values of a notebook's parameters cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    if not tagged:
        raise ValueError(f"{notebook.name} has no cell tagged parameters")
    tree = ast.parse("".join(tagged[0]["source"]))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}


def check_parameters(notebook: Path, given: Mapping[str, object]) -> None:
    """Raises ValueError, naming what is known, for a parameter, preset, variant or plan file that is not."""
    known = parameters_of(notebook)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(unknown)}: it knows {', '.join(known)}")
    if given.get("preset") is not None and given["preset"] not in PRESETS:
        raise ValueError(f"unknown preset {given['preset']!r}: expected one of {', '.join(PRESETS)}")
    if given.get("variant") is not None:
        requested_plan(given)


# --- inside a notebook ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of one notebook.

    Attributes:
        preset: the preset with the notebook's parameters in place.
        variant: the name of the removal plan; None where the notebook knows no variant.
        plan: the plan itself.
        dir: the folder that everything this run writes goes to.
        standard: whether this is the run that the notebook's claims are about: a measured preset and no parameter but
            variant and output_dir changed. Claims about results are checked in such runs only.
    """

    notebook: str
    preset: Preset
    variant: str | None
    plan: RemovalPlan | None
    seed: int
    device: str
    dir: Path
    config: dict
    provenance: dict
    standard: bool
    started: float = field(default_factory=time.perf_counter)

    def finish(self, metrics: Mapping[str, object], key_figure: str = "") -> None:
        """Writes result.json; only a run that came this far has one."""
        seconds = round(time.perf_counter() - self.started, 1)
        result = {
            "notebook": self.notebook, "preset": self.preset.name, "variant": self.variant, "config": self.config,
            "metrics": {"key_figure": key_figure, **metrics}, "provenance": {**self.provenance, "seconds": seconds},
        }  # fmt: skip
        write_json(self.dir / "result.json", result)
        print(f"{self.notebook} done in {seconds:.0f} s: {key_figure}\nresult: {_relative(self.dir / 'result.json')}")

    def or_skip(self, make: Callable, *arguments, **named) -> object | None:
        """`make(…)`, or None and a line that says why: a preset that was never run here may lack weights or data.

        What is there and wrong is an error with every preset.
        """
        try:
            return make(*arguments, **named)
        except Missing as error:
            if self.preset.measured:
                raise
            print(f"What needs this is skipped: {error}")
            return None

    def save(self, figure, name: str) -> None:
        """Saves a matplotlib figure as name.png in the run's folder."""
        figure.savefig(self.dir / f"{name}.png", dpi=110, bbox_inches="tight")


def start(notebook: str, variables: Mapping[str, object]) -> Run:
    """Begins a run: checks the parameters, fills in the preset's, makes the folder, prints one line of provenance.

    Args:
        notebook: the notebook's stem, "03_kd_training".
        variables: where the values of its parameters are found; a notebook passes `globals()`.

    Raises:
        ValueError: an unknown preset or variant, or a number out of range.
    """
    path = find_notebook(notebook)
    given = {name: variables[name] for name in parameters_of(path)}
    import torch

    config, preset = configure(path, given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan, seed = requested_plan(given), given.get("seed") or 0
    variant = plan.name if plan else None
    folder = Path(given.get("output_dir") or ROOT / "outputs" / notebook / run_name(given))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # an older run's result must not stand for this one
    write_json(folder / "config.json", config)
    free = ("variant", "output_dir")
    changed = {name for name, value in parameters_of(path).items() if given[name] != value and name not in free}
    standard = preset.measured and not changed and not str(given.get("variant")).endswith(".json")
    run = Run(notebook, preset, variant, plan, seed, device, folder, config, provenance(device), standard)
    print(describe(run))
    return run


def configure(notebook: Path, given: Mapping[str, object]) -> tuple[dict, Preset]:
    """Every parameter of a notebook, the given ones in place, and as `resolved` the preset they come to; and that.

    Raises:
        ValueError: an unknown parameter, preset or variant, or a number out of range.
    """
    check_parameters(notebook, given)
    values = {**parameters_of(notebook), **given}
    preset = find_preset(values.get("preset", "storybook"), **{k: v for k, v in values.items() if k != "preset"})
    return {**values, "resolved": asdict(preset)}, preset


def requested_plan(parameters: Mapping[str, object]) -> RemovalPlan | None:
    """The removal plan that a notebook's parameters ask for: by name, from a .json file, or the preset's."""
    if "variant" not in parameters:
        return None
    from .surgery import find_plan

    return find_plan(parameters["variant"] or find_preset(parameters.get("preset", "storybook")).variant)


def folder_name(preset: str, variant: str | None) -> str:
    """ "storybook-bk_small", or "storybook" where there is no variant."""
    return re.sub(r"[^\w.=+-]+", "_", f"{preset}-{variant}" if variant else preset)


def run_name(parameters: Mapping[str, object], swept: Sequence[str] = ()) -> str:
    """What a run's folder is called: preset, variant, the subject where one is named, and what is swept."""
    plan = requested_plan(parameters)
    subject = ["subject"] if parameters.get("subject") else []
    told = dict.fromkeys(key for key in (*subject, *swept) if key not in ("preset", "variant"))
    name = "-".join([plan.name if plan else "", *(f"{key}_{parameters[key]}" for key in told)]).strip("-")
    return folder_name(str(parameters.get("preset") or "storybook"), name)


def provenance(device: str) -> dict:
    """Device, versions, commit and time of a run."""
    packages = ("torch", "diffusers", "transformers", "accelerate")
    return {
        "device": _device_name(device), "python": platform.python_version(),
        **{name: version(name) for name in packages}, "commit": _commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def describe(run: Run) -> str:
    """The one line that a run begins with."""
    p = run.provenance
    what = folder_name(run.preset.name, run.variant)
    versions = f"torch {p['torch']}, diffusers {p['diffusers']}"
    return f"{what} on {p['device']} | {versions} | commit {p['commit']} | {_relative(run.dir)}"


def collect(runs_dir: Path) -> tuple[list[dict], list[tuple[str, str]]]:
    """Every result.json below a folder, each with its `folder`, and (path, reason) of those that could not be read."""
    results, unreadable = [], []
    for path in sorted(runs_dir.glob("*/*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            missing = {"notebook", "preset", "variant", "config", "metrics", "provenance"} - set(result)
            if missing:
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
            results.append(result | {"folder": f"{path.parent.parent.name}/{path.parent.name}"})
        except (OSError, ValueError) as error:
            unreadable.append((str(path), str(error)))
    return results, unreadable


def changed(result: Mapping, free: Collection[str] = ()) -> str:
    """What a collected run was told otherwise than its notebook's defaults: "batch_size 8, seed 1".

    Args:
        free: parameters that are left out.
    """
    defaults = parameters_of(find_notebook(result["notebook"]))
    told = {name: value for name, value in result["config"].items() if name in defaults and name not in free}
    return ", ".join(f"{name} {value}" for name, value in told.items() if value != defaults[name])


def check(condition: object, proved: str) -> None:
    """An assertion that says what it proved.

    Raises:
        AssertionError: the condition does not hold.
    """
    if not condition:
        raise AssertionError(f"does not hold: {proved}")
    print(f"✓ {proved}")


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


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def _commit() -> str:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def _relative(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


# --- headless runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One notebook with one set of parameter values."""

    notebook: Path
    parameters: dict[str, object]
    dir: Path


def literal(text: str) -> object:
    """A value typed on the command line: a Python literal, true, false, none, or else a string."""
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


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
    parser = argparse.ArgumentParser(prog="python -m bksdm_utils.run", description=__doc__,
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
