"""Schedulers by name, on a teacher's own noise schedule (notebooks 04 to 06)."""

from __future__ import annotations

import diffusers

from .pipelines import Pipeline, with_unet

SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}), "dpm++": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}), "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {}),
}  # fmt: skip


def with_scheduler(pipeline: Pipeline, name: str | None) -> Pipeline:
    """The same pipeline with another scheduler of the same noise schedule; None keeps its own."""
    if name is None:
        return pipeline
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}: expected one of {', '.join(SCHEDULERS)}")
    cls, changes = SCHEDULERS[name]
    changed = with_unet(pipeline, pipeline.unet)
    changed.scheduler = getattr(diffusers, cls).from_config(pipeline.scheduler.config, **changes)
    return changed
