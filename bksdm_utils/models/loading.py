"""Loading of pretrained networks and tokenizers, with one kind of error for all of them (every notebook)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import NotAvailable, is_hub_id, resolve


@contextmanager
def named_errors(what: str, path: str | Path, expected: str = "a save_pretrained folder") -> Iterator[None]:
    """Within the block every error of diffusers, transformers, peft or the hub becomes one that names `path`.

    Raises:
        NotAvailable: `path` is a hub id that is neither on this machine nor could be fetched.
        ValueError: the path does not exist, or what it holds is incomplete, damaged or something else.
    """
    try:
        yield
    except Exception as error:  # these libraries raise many kinds
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 400)}"
        message = f"{what} {str(path)!r} could not be loaded ({reason})"
        if is_hub_id(path):
            raise NotAvailable(f"{message}. With a network: hf download {path}") from error
        raise ValueError(f"{message}: expected {expected}, or a hub id") from error


def load(cls: type, path: str | Path, **kwargs) -> Any:
    """`cls.from_pretrained` of a diffusers or transformers class, without progress bars and hints.

    With `local_files_only=True` nothing is fetched. Raises as `named_errors`.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with named_errors(cls.__name__, path):
        return cls.from_pretrained(resolve(path), **kwargs)
