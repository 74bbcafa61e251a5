"""Checkpoints: written completely or not at all, limited in number, read only by the same run (notebook 03)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from ..files import folder_lock, resolve
from ..models.saving import load_weights


class Saved(NamedTuple):
    """A checkpoint as it was read: step.json, raw weights, averaged weights, state of optimizer and scaler."""

    info: dict
    weights: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor]
    state: dict


class Checkpoints:
    """The folder `checkpoints` of a run.

    Args:
        name: of the model's folder in each checkpoint; `name`_ema has the averaged weights.
        keep: how many of the newest are kept; 0 keeps all.
    """

    def __init__(self, output_dir: Path, name: str, keep: int):
        self.output_dir, self.folder, self.name, self.keep = output_dir, output_dir / "checkpoints", name, keep

    @property
    def all(self) -> list[Path]:
        """Every checkpoint, oldest first."""
        return sorted(self.folder.glob("step_*[0-9]"))

    @property
    def newest(self) -> Path | None:
        return max(self.all, default=None)

    def write(self, step: int, write: Callable[[Path], None]) -> None:
        """Has `write(folder)` fill a temporary folder, renames it, and removes those beyond the limit.

        Raises:
            OSError: it could not be written; earlier ones are untouched.
        """
        part, target = self.folder / "part", self.folder / f"step_{step:08}"
        if target.exists():
            return
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            write(part)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk so
            shutil.rmtree(part, ignore_errors=True)
            kept = f"{self.newest} is untouched" if self.newest else "there is no earlier one"
            raise OSError(f"the checkpoint of step {step} could not be written ({error}); {kept}") from error
        os.replace(part, target)
        for old in self.all[: -self.keep] if self.keep else ():
            shutil.rmtree(old, ignore_errors=True)

    def find(self, named: str | None) -> Path | None:
        """The checkpoint to continue from: by its path or its folder's name, where none is named the newest.

        Raises:
            ValueError: there is none of this name.
        """
        if named is None:
            return self.newest
        for path in (Path(resolve(named)), self.folder / named):
            if (path / "step.json").is_file():
                return path
        known = ", ".join(path.name for path in self.all) or "none"
        raise ValueError(f"checkpoint is {named!r}: expected the folder of a checkpoint, or one of {self.folder.name}/ "
                         f"({known})")  # fmt: skip

    def set_aside(self, last: Path | None = None) -> None:
        """Moves checkpoints to checkpoints.old, so that no resumption continues from them.

        Args:
            last: the one that a run goes on from; only later ones are moved, all where it is of another folder.
        """
        checkpoints, old = self.all, self.folder.with_name("checkpoints.old")
        later = [path for path in checkpoints if path > last] if last in checkpoints else checkpoints
        if later:
            with folder_lock(self.output_dir):  # never those of a run in progress
                shutil.rmtree(old, ignore_errors=True)
                old.mkdir()
                for path in later:
                    os.replace(path, old / path.name)
            print(f"{len(later)} checkpoints of an earlier run were moved to {old.name}")

    def check(self, folder: Path, fixed: Mapping[str, object], limit: int) -> dict:
        """What step.json of a checkpoint says, once it is known to be of the same run.

        Args:
            fixed: settings that must be as they were.
            limit: the most steps it may have.

        Raises:
            ValueError: it cannot be read, has other settings, or more steps.
        """
        info = _readable(folder, lambda: json.loads((folder / "step.json").read_text(encoding="utf-8")))
        changed = {k: (v, fixed[k]) for k, v in info["fixed"].items() if k in fixed and v != fixed[k]}
        if changed:
            raise ValueError(f"{folder} was written with other settings (then, now): {json.dumps(changed)}. "
                             "Use the same settings, or another output_dir, or resume=False.")  # fmt: skip
        if info["step"] > limit:
            raise ValueError(f"{folder} has step {info['step']}, beyond max_train_steps {limit}: raise it, or start "
                             "anew with resume=False")  # fmt: skip
        return info

    def read(self, folder: Path, averaged: bool, fixed: Mapping[str, object], limit: int) -> Saved:
        """A checkpoint of the same run; arguments and errors as of `check`."""

        def tensors() -> tuple:
            ema = load_weights(folder / f"{self.name}_ema") if averaged else {}
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            return load_weights(folder / self.name), ema, state

        loaded = _readable(folder, tensors)
        return Saved(self.check(folder, fixed, limit), *loaded)


def _readable(folder: Path, read: Callable[[], object]) -> object:
    try:
        return read()
    except Exception as error:  # cut off, not a checkpoint, not readable: each library raises its own kinds
        raise ValueError(f"{folder} could not be read ({type(error).__name__}): delete it to continue from the one "
                         "before, or start anew with resume=False") from error  # fmt: skip
