"""Start and finish of a notebook run."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from ..config.presets import Preset, find_preset
from ..core.plans import RemovalPlan
from ..files import ROOT, NotAvailable, write_json
from .parameters import check_parameters, find_notebook, parameters_of, requested_plan


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
        except NotAvailable as error:
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
