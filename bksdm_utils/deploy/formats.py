"""What several export formats share (notebook 06)."""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from diffusers import StableDiffusionPipeline


class NotInstalled(ValueError):
    """An export needs a package that is not installed; the message says how to install it."""


class NotExpressible(ValueError):
    """A format cannot hold this model; the message names one that can."""


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing is printed: converters print hundreds of lines, and raise what goes wrong."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def require(*packages: str) -> list:
    """Optional packages, imported."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise NotInstalled(f"this export needs {error.name}: pip install -e '.[export]'") from error


def check_sd(pipeline: StableDiffusionPipeline) -> None:
    """Raises NotExpressible for an SDXL pipeline."""
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise NotExpressible(f"this format is for SD-v1 and SD-v2, not for a {type(pipeline).__name__}: use diffusers")


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Saves with vocab.json and merges.txt, which transformers 5 no longer writes and transformers 4 needs."""
    tokenizer.save_pretrained(folder)
    if not (folder / "vocab.json").is_file():
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def prefixed(name: str) -> str:
    """A text encoder's parameter name with the prefix that transformers 4 expects and transformers 5 leaves out."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
