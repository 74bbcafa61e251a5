"""Start and finish of a notebook run."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from ..config.base import Config
from ..config.plan_files import find_plan, plan_name
from ..config.presets import STORYBOOK, Preset
from ..core.plans import RemovalPlan
from ..files import ROOT, NotAvailable, write_json
from ..models.configs import teacher_config
from .parameters import assigned_parameters
from .protection import check_folder

NAME_BYTES = 150  # of a run's folder; file systems allow 255


@dataclass
class Run:
    """One run of one notebook.

    Attributes:
        config: the parameters, the preset's values and the device filled in: what runs, and what config.json says.
        plan: the removal plan; None where the notebook has no variant.
        dir: the folder that everything this run writes goes to.
        standard: whether the notebook's claims are about this run: a measured preset and no parameter but variant,
            device and output_dir changed. Claims about results are checked in such runs only.
    """

    config: Config
    preset: Preset
    plan: RemovalPlan | None
    dir: Path
    provenance: dict
    standard: bool
    started: float = field(default_factory=time.perf_counter)

    @property
    def variant(self) -> str | None:
        """The plan's name."""
        return self.plan.name if self.plan else None

    @property
    def device(self) -> str:
        return self.config.device

    @property
    def seed(self) -> int:
        return self.config.seed

    def finish(self, metrics: Mapping[str, object], key_figure: str = "") -> None:
        """Writes result.json; only a run that came this far has one."""
        seconds = round(time.perf_counter() - self.started, 1)
        result = {
            "notebook": self.config.notebook, "preset": self.preset.name, "variant": self.variant,
            "config": self.config.model_dump(mode="json"), "metrics": {"key_figure": key_figure, **metrics},
            "provenance": {**self.provenance, "seconds": seconds},
        }  # fmt: skip
        write_json(self.dir / "result.json", result)
        print(f"{self.config.notebook} finished in {seconds:.0f} s: {key_figure}\n"
              f"result: {relative(self.dir / 'result.json')}")  # fmt: skip

    def if_available(self, make: Callable, *args, **kwargs) -> object | None:
        """`make(…)`, or None and a line that says why: a preset that was never run here may lack weights or data.

        Anything that exists and is wrong is an error with every preset.
        """
        try:
            return make(*args, **kwargs)
        except NotAvailable as error:
            if self.preset.measured:
                raise
            print(f"Skipped, with all that needs it: {error}")
            return None

    def save(self, figure, name: str) -> None:
        """Saves a matplotlib figure as name.png in the run's folder."""
        figure.savefig(self.dir / f"{name}.png", dpi=110, bbox_inches="tight")


def start(kind: type[Config], variables: Mapping[str, object]) -> Run:
    """Begins a run: checks the parameters, fills in the preset's, makes the folder, prints one line of provenance.

    Args:
        kind: the notebook's parameter class.
        variables: where its parameters are found; a notebook passes `globals()`.

    Raises:
        ValueError: a parameter is missing, unknown, or does not fit; every fault is named.
    """
    missing = [name for name in kind.model_fields if name not in variables]
    if missing:
        raise ValueError(f"the parameters cell lacks {', '.join(missing)}: run it first, or restore it from git")
    unknown = assigned_parameters(variables.get("In", ()), kind) - set(kind.model_fields)
    given = {name: variables[name] for name in (*kind.model_fields, *sorted(unknown))}
    config = fill(kind, given)
    config = config.but(device=choose_device(config.device))
    plan = find_plan(config.variant, teacher_config(config)) if hasattr(config, "variant") else None
    folder = Path(config.output_dir or ROOT / "outputs" / config.notebook / run_name(config))
    check_folder(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # an older run's result must not pass for this one's
    write_json(folder / "config.json", config.model_dump(mode="json"))
    preset = getattr(config, "chosen_preset", STORYBOOK)
    origin = provenance(config.device)
    run = Run(config, preset, plan, folder, origin, preset.measured and _is_standard(kind, given))
    name, versions = folder_name(preset.name, run.variant), f"torch {origin['torch']}, diffusers {origin['diffusers']}"
    print(f"{name} on {origin['device']} | {versions} | commit {origin['commit']} | {relative(folder)}")
    return run


def fill(kind: type[Config], given: Mapping[str, object]) -> Config:
    """The parameters with the preset's values filled in, where the class has presets."""
    return kind.filled(**given) if hasattr(kind, "filled") else kind(**given)


def _is_standard(kind: type[Config], given: Mapping[str, object]) -> bool:
    values, default = kind(**given).values(), kind().values()
    changed = {name for name, value in values.items() if value != default[name]}
    return changed <= {"variant", "output_dir", "device"} and not str(values.get("variant")).endswith(".json")


def choose_device(device: str) -> str:
    """The device itself, for auto the first that exists.

    Raises:
        ValueError: torch does not find the device.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, exists in available.items() if exists)
    if not available[device]:
        raise ValueError(f"device is {device!r}, which torch {torch.__version__} does not find here: expected auto or "
                         f"{', '.join(name for name, exists in available.items() if exists)}")  # fmt: skip
    return device


def folder_name(preset: str, variant: str | None) -> str:
    """ "storybook-bk_small", or "storybook" without a variant; at most `NAME_BYTES` bytes, long names by their hash."""
    name = re.sub(r"[^\w.=+-]+", "_", f"{preset}-{variant}" if variant else preset)
    if len(name.encode()) <= NAME_BYTES:
        return name
    return name.encode()[: NAME_BYTES - 9].decode(errors="ignore") + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


def run_name(config: Config, swept: Sequence[str] = ()) -> str:
    """The name of a run's folder: preset, variant, the subject where one is named, and what is swept."""
    values, subject = config.values(), []
    if values.get("subject") is not None:
        own = config.chosen_preset.values_for(type(config).__name__).get("subject")
        subject = ["subject"] if values["subject"] != own else []
    named = dict.fromkeys(name for name in (*subject, *swept) if name not in ("preset", "variant"))
    parts = [plan_name(values["variant"])] if values.get("variant") else []
    return folder_name(values.get("preset", "storybook"), "-".join([*parts, *(f"{n}_{values[n]}" for n in named)]))


def student_folder(config: Config) -> Path:
    """Where notebook 03 leaves the student of this preset and variant: averaged, or raw where it kept no average."""
    folder = ROOT / "outputs" / "03_kd_training" / folder_name(config.preset, plan_name(config.variant))
    kept = (folder / "unet_ema").is_dir() or not (folder / "unet").is_dir()
    return folder / ("unet_ema" if kept else "unet")


def provenance(device: str) -> dict:
    """Device, versions, commit and time of a run."""
    name = f"{device} ({platform.machine()}, {os.cpu_count()} cores)"
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    packages = {package: version(package) for package in ("torch", "diffusers", "transformers", "accelerate")}
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    python = platform.python_version()
    return {"device": name, "python": python, **packages, "commit": _commit(), "started": started}


def check(condition: object, proved: str) -> None:
    """An assertion that says what it proved.

    Raises:
        AssertionError: the condition does not hold.
    """
    if not condition:
        raise AssertionError(f"does not hold: {proved}")
    print(f"✓ {proved}")


def _commit() -> str:
    """The commit of this project; unknown where it is not a repository of its own."""
    command = ["git", "--git-dir", ".git", "--work-tree", ".", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        return "unknown"


def relative(path: Path) -> str:
    """A path as the repository's users know it: relative to the root, or the name alone."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
