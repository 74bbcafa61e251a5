"""Finds the training images of any source: storybook, folders, shards, data sets of the hub (notebook 03)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..config.training import TrainingData
from ..files import is_hub_id, resolve
from .examples import Example, Skipped, storybook_examples
from .folders import folder_rows
from .shards import shard_files, table_rows


def load_examples(config: TrainingData) -> tuple[list[Example], Skipped]:
    """The training examples, and what was set aside; ValueError where the source or its columns do not exist."""
    source = config.train_data_dir
    if source is None:
        return storybook_examples(config.num_train_scenes), []
    of_the_hub = is_hub_id(source) or re.fullmatch(r"[\w-]+", source) and not os.path.exists(resolve(source))
    is_table = shard_files(source) or of_the_hub
    rows = list(table_rows(config) if is_table else folder_rows(Path(resolve(source)), config))
    examples = [row for row in rows if isinstance(row, Example)]
    skipped = [row for row in rows if not isinstance(row, Example)]
    if not examples:
        raise ValueError(f"{source}: none of {len(rows)} rows is usable (first: {skipped[:1]}): add images, captions")
    return examples, skipped
