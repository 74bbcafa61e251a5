"""Parameters of notebook 07."""

from __future__ import annotations

from typing import ClassVar

from .base import PathText, parameter
from .shared import Common


class Results(Common):
    """Notebook 07: all runs in one table."""

    notebook: ClassVar[str] = "07_results"

    runs_dir: PathText | None = parameter(None, "folder with the runs; None: outputs")
    readme: PathText | None = parameter(None, "Markdown file whose table between the marks students is written anew")
