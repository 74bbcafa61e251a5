"""What every export does (notebook 06).

Each export is written under a temporary name and renamed at the end, never over anything that exists, and made to be
loaded by programs that know nothing of this package.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from diffusers import StableDiffusionPipeline


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` once everything in it is written.

    Raises:
        ValueError: `folder` is there and not empty, or cannot be written.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is there already: name another folder, or remove it first")
        part.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): name a folder of your own") from error
    try:
        yield part
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Converters print hundreds of lines that nobody can act on; what goes wrong they raise."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class NotInstalled(ValueError):
    """An export needs a package that is not here; the message says how to install it."""


class NotExpressible(ValueError):
    """A format cannot hold this model; the message says which one can."""


def _needs(*packages: str) -> list:
    """Optional packages, imported."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise NotInstalled(
            f"this export needs {error.name}, which is not installed: pip install -e '.[export]'"
        ) from error


def _check_sd(pipeline: StableDiffusionPipeline) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise NotExpressible(
            f"this export is written for SD-v1 and SD-v2, not for a {type(pipeline).__name__}: export a diffusers "
            "folder instead"
        )


def _save_tokenizer(tokenizer, folder: Path) -> None:
    """With vocab.json and merges.txt, which transformers 5 no longer writes and transformers 4 wants."""
    tokenizer.save_pretrained(folder)
    if (folder / "vocab.json").is_file():
        return
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def _prefixed(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def upload(folder: str | Path, repo_id: str | None, push_to_hub: bool = False) -> None:
    """Shows what would be uploaded to the Hugging Face hub, and uploads it only when told to.

    Raises:
        ValueError: it shall be uploaded, and `repo_id` does not say where to.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    total = sum(file.stat().st_size for file in files)
    print(f"to {repo_id or '(no repo_id)'}, which is made private if it is new: {len(files)} files, "
          f"{total / 1e6:.1f} MB")  # fmt: skip
    for file in files:
        print(f"  {file.relative_to(folder)}  {file.stat().st_size / 1e6:.2f} MB")
    if not push_to_hub:
        print("nothing was uploaded: push_to_hub is False")
        return
    if not repo_id:
        raise ValueError("push_to_hub is True, but there is no repo_id: expected one such as name/bk-sdm-small")
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=True, exist_ok=True)
    print(f"{repo_id} is {'private' if api.repo_info(repo_id).private else 'public: everybody sees what comes now'}")
    api.upload_folder(folder_path=folder, repo_id=repo_id)
