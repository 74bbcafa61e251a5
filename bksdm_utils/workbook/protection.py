"""Nothing overwrites a trained student by accident: a run's folder is looked at before the run starts (notebook 03)."""

from __future__ import annotations

import json
from pathlib import Path

from ..config.base import Config, heading_of
from ..config.training import KDTraining
from ..files import read_log

WEIGHTS = ("checkpoints/step_*", "unet", "unet_ema")
# What may differ between two runs that train the same weights; beside it what only samples, scores or saves memory.
FREE = {"device", "output_dir", "resume", "checkpoint", "checkpoint_steps", "checkpoints_kept", "trackers",
        "max_train_steps", "max_skipped_steps", "cache_dir", "ema_device", "tf32", "batch_size",
        "gradient_accumulation_steps"}  # fmt: skip
FREE_SECTIONS = ("sampling", "speed and memory", "evaluation")


def check_folder(config: Config, folder: Path) -> None:
    """Refuses to train anew where something is trained already that the new run would not give again.

    The same run may be repeated; with `resume` a run is continued, and its checkpoints are checked.

    Raises:
        ValueError: the folder holds a run with other settings, with more steps, or one that was interrupted.
    """
    if not isinstance(config, KDTraining) or config.resume or not any(any(folder.glob(name)) for name in WEIGHTS):
        return
    steps = int(max((row["step"] for row in read_log(folder / "log.csv")), default=0))
    earlier = _earlier(folder)
    changed = _changed(earlier, config) if earlier else {"config.json": "not readable"}
    if changed:
        held = f"a student trained with other settings (there, here): {json.dumps(changed, default=str)}"
    elif steps > config.max_train_steps:
        held = f"a student trained for {steps} steps; max_train_steps is {config.max_train_steps}"
    elif 0 < steps < earlier.max_train_steps:
        held = f"a run interrupted at step {steps} of {earlier.max_train_steps}"
    else:
        return
    raise ValueError(f"{folder} holds {held}. This run would overwrite it: name another output_dir; or "
                     "continue it with its own settings and resume=True; or delete the folder")  # fmt: skip


def _earlier(folder: Path) -> KDTraining | None:
    try:
        return KDTraining(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # none, cut short, or of a version with other parameters
        return None


def _changed(earlier: KDTraining, config: KDTraining) -> dict[str, tuple]:
    then, now = ({**each.values(), "images of a step": each.global_batch_size} for each in (earlier, config))
    names = [name for name in _trained_with() if then[name] != now[name]]
    return {name: (then[name], now[name]) for name in names}


def _trained_with() -> list[str]:
    """The parameters that decide about the weights."""
    names, section = ["images of a step"], None
    for name, field in KDTraining.model_fields.items():
        section = heading_of(field) or section
        if name not in FREE and section not in FREE_SECTIONS:
            names.append(name)
    return names
