"""Loading of pretrained networks and tokenizers, with one kind of error for all of them (every notebook)."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError

from ..files import NotAvailable, is_hub_id, looked_in, resolve

FILES = (None, "fp16", "non_ema")  # variants of weight files, the plain one first
WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|module)\.)+")  # names' prefixes of torch.compile and DDP
HARMLESS = re.compile(r"(^|\.)(position_ids$|pooler\.)")  # of older files; heads that nobody asks


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
        if _asks_for_a_token(error):
            raise NotAvailable(f"{message}. The hub wants to know who asks: accept the model's terms on its page, then "
                               f"hf auth login, or set HF_TOKEN") from error  # fmt: skip
        if is_hub_id(path):
            raise NotAvailable(f"{message}. With a network: hf download {path}") from error
        place = "" if os.path.exists(resolve(path)) else f" ({looked_in(path)})"
        raise ValueError(f"{message}: expected {expected}, or a hub id{place}") from error


def _asks_for_a_token(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the hub's refusal of a missing, wrong or insufficient token."""
    while error is not None:
        if isinstance(error, GatedRepoError) or getattr(getattr(error, "response", None), "status_code", 0) in (
            401,
            403,
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def load(cls: type, path: str | Path, **kwargs) -> Any:
    """`cls.from_pretrained` of a diffusers or transformers class, without progress bars and hints.

    A network is loaded completely or not at all: no tensor stays random, none of the file's is left out. Files that
    exist in half precision or without averaged weights only are taken. With `local_files_only=True` nothing is fetched.

    Raises as `named_errors`.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with named_errors(cls.__name__, path):
        if hasattr(cls, "load_state_dict"):
            _check_files(Path(resolve(path), kwargs.get("subfolder", "")))
            model = _network(cls, resolve(path), **kwargs)
            check_finite(model)
            return model
        return cls.from_pretrained(resolve(path), **kwargs)


def check_tokenizer(tokenizer: Any, vocabulary: int, path: str | Path) -> None:
    """Raises ValueError for a tokenizer that is not of a text encoder with so many tokens.

    Without its files transformers makes one that knows no word.
    """
    if not 0.9 * vocabulary <= len(tokenizer) <= vocabulary:
        raise ValueError(
            f"the tokenizer of {str(path)!r} has {len(tokenizer):,} tokens, its text encoder "
            f"{vocabulary:,}: expected the tokenizer that it was trained with; are its files there?"
        )


def _check_files(folder: Path) -> None:
    """Raises ValueError for weight files that are cut short or hold integers, of which values would be made up."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in list(opened.keys())}
        except SafetensorError as error:
            raise ValueError(f"{file.name} is cut short or no file of safetensors ({error})") from None
        if whole := sorted(name for name, kind in kinds.items() if kind[0] in "IU" and not HARMLESS.search(name)):
            raise ValueError(f"{file.name} holds integers ({whole[0]} and {len(whole) - 1} more): quantised weights "
                             "cannot be loaded as plain ones")  # fmt: skip


def check_finite(model: Any) -> None:
    """Raises ValueError where a weight is not a number or infinite, as a diverged training leaves them."""
    wrong = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"{len(wrong)} of its tensors hold NaN or infinite values, such as {wrong[0]}")


def _network(cls: type, path: str, **kwargs) -> Any:
    for variant in FILES:
        try:
            named = {"variant": variant} if variant else {}
            model, info = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True,
                                              **named, **kwargs)  # fmt: skip
            break
        except OSError:  # there is no such file
            if variant == FILES[-1]:
                raise
    faults = [names for key in ("missing_keys", "unexpected_keys") if (names := _that_matter(info[key]))]
    if not (faults or info["mismatched_keys"]):
        return model
    return _with_other_spelling(cls, Path(path), variant, **kwargs)


def _that_matter(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not HARMLESS.search(name))


def _with_other_spelling(cls: type, path: Path, variant: str | None, subfolder: str = "", **kwargs) -> Any:
    """The network with the tensors of its file under the names that it gives them itself.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    ours = {name: kwargs.pop(name, None) for name in ("local_files_only", "torch_dtype")}
    if hasattr(cls, "config_class") and cls.config_class:  # of transformers
        model = cls(cls.config_class.from_pretrained(path, subfolder=subfolder), **kwargs)
    else:
        model = cls.from_config(cls.load_config(path, subfolder=subfolder), **kwargs)
    wanted = model.state_dict()
    tensors = {_spelled(name, wanted): tensor for name, tensor in _tensors(path / subfolder, variant).items()}
    missing, more = _that_matter(wanted.keys() - tensors.keys()), _that_matter(tensors.keys() - wanted.keys())
    shapes = [f"{name} is {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
              for name, tensor in tensors.items() if name in wanted and tensor.shape != wanted[name].shape]  # fmt: skip
    texts = {"lacks": missing, "has unknown": more, "other shapes:": shapes}
    if wrong := [f"{text} {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
                 for text, names in texts.items() if names]:  # fmt: skip
        raise ValueError(f"the file of its weights is another model's, or damaged: {'; '.join(wrong)}")
    model.load_state_dict(tensors, strict=False)
    return model.to(ours["torch_dtype"]).eval()


def _spelled(name: str, wanted: Container[str]) -> str:
    """A tensor's name as the network itself spells it: without a wrapper's prefix, with or without `text_model.`"""
    bare = WRAPPERS.sub(r"\1", name)
    for spelling in (bare, f"text_model.{bare}", bare.removeprefix("text_model.")):
        if spelling in wanted:
            return spelling
    return bare


def _tensors(folder: Path, variant: str | None) -> dict:
    """All tensors of a folder's weight files, .safetensors first."""
    import torch
    from safetensors.torch import load_file

    middle = f".{variant}" if variant else ""
    for kind in ("safetensors", "bin"):
        whole = re.compile(rf"[^.]+?(-\d+-of-\d+)?{middle}(-\d+-of-\d+)?\.{kind}")
        files = [file for file in sorted(folder.glob(f"*.{kind}")) if whole.fullmatch(file.name)]
        if files:
            read = load_file if kind == "safetensors" else partial(torch.load, map_location="cpu", weights_only=True)
            return {name: tensor for file in files for name, tensor in read(file).items()}
    raise ValueError(f"{folder} has no weight files of its own: its weights cannot be read under other names")
