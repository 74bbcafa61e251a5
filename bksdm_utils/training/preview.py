"""Images of fixed prompts by teacher and student during a training, side by side (notebook 03)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..models.pipelines import Pipeline

COLUMNS = 8  # of a grid


class Preview(Protocol):
    """The prompts of a validation: sampled from the same noise by any pipeline, and scored where a CLIP is at hand."""

    def sample(self, pipeline: Pipeline) -> list[Image.Image]:
        """One image for each prompt."""

    def scores(self, images: Sequence[Image.Image]) -> Mapping[str, float]:
        """Scores by name; none without a CLIP model."""


def image_rows(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """One image of rows below each other, at most `COLUMNS` wide: the first of every row, then what is left."""
    parts = [row[start : start + COLUMNS] for start in range(0, len(rows[0]), COLUMNS) for row in rows]
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * min(COLUMNS, len(rows[0])), height * len(parts)), "white")
    for y, part in enumerate(parts):
        for x, image in enumerate(part):
            grid.paste(image, (x * width, y * height))
    return grid


def save_grid(rows: Sequence[Sequence[Image.Image]], folder: Path, step: int) -> Image.Image:
    """`image_rows`, also written as step_<step>.png, completely or not at all."""
    grid, part = image_rows(rows), folder / "part.png"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(part)
    os.replace(part, folder / f"step_{step:08}.png")
    return grid


class PreviewFolder:
    """The folder `validation` of a run: a grid for each validation, the teacher's images above the student's.

    The teacher's are sampled once, at the first.
    """

    def __init__(self, folder: Path, preview: Preview):
        self.folder, self.preview, self.by_teacher = folder / "validation", preview, None

    def sample(self, teacher: Pipeline, student: Pipeline, step: int) -> tuple[Image.Image, Mapping[str, float]]:
        """Samples with both, writes step_<step>.png; returns the grid and the scores of the student's images."""
        self.by_teacher = self.by_teacher or self.preview.sample(teacher)
        images = self.preview.sample(student)
        return save_grid([self.by_teacher, images], self.folder, step), self.preview.scores(images)


def newest_grid(folder: Path) -> Path | None:
    """The grid of a run's latest validation."""
    return max((folder / "validation").glob("step_*.png"), default=None)
