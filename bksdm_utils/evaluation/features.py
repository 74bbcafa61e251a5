"""Features that are computed once and kept, and the real images that generated ones are compared with (notebook 04)."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from ..data.examples import Skipped, storybook_examples
from ..data.images import IMAGE_SUFFIXES, files_below
from ..files import in_threads
from .networks import Network

Openers = Mapping[str, Callable[[], object]]  # hash of an image, or a text -> what opens or gives it


def compute(folder: Path, network: Network, items: Openers) -> tuple[dict[str, np.ndarray], Skipped]:
    """Feature rows of items: those that `folder` keeps, and the others, which it then keeps in a file for each batch.

    The next items are prepared while the network computes. A progress bar with an estimate appears after ten seconds.

    Returns:
        key -> row, (dim,); and (key, reason) of what could not be opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, failed = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        rows |= load_file(path)
    batch_size = 128 if torch.cuda.is_available() else 32  # more images of 299 pixels would not fit a CPU's caches

    def prepared(key: str) -> tuple[str, torch.Tensor | str]:
        try:
            return key, network.prepare(items[key]())
        except Exception as error:  # Pillow raises many kinds for a broken file
            return key, str(error) or type(error).__name__

    missing = [key for key in items if key not in rows]
    ready = in_threads(prepared, missing, ahead=2 * batch_size)
    look = {"file": sys.stdout, "mininterval": 10, "delay": 10, "ascii": True, "ncols": 70}
    with tqdm(total=len(missing), desc=network.name, **look) as bar:
        while batch := list(islice(ready, batch_size)):
            failed += [(key, reason) for key, reason in batch if isinstance(reason, str)]
            if good := {key: tensor for key, tensor in batch if not isinstance(tensor, str)}:
                computed = network.rows(list(good.values())).float().cpu().numpy()
                path, new = folder / f"{len(rows):09d}.safetensors", dict(zip(good, computed, strict=True))
                save_file(new, path.with_suffix(".part"))
                os.replace(path.with_suffix(".part"), path)
                rows |= new
            bar.update(len(batch))
    return rows, failed


def real_images(path: Path | None, count: int = 1000) -> Openers:
    """Real images by the hash of their contents: of a folder or a .zip, or renders of storybook's test scenes.

    Args:
        path: None is the storybook.
        count: of storybook's renders.

    Raises:
        ValueError: it cannot be read, or it has no images.
    """
    if path is None:
        return {example.key: example.open for example in storybook_examples(count, "test")}
    if path.is_dir():
        paths = _images(files_below(path), path)
        hashes = in_threads(lambda file: hashlib.sha256(file.read_bytes()).hexdigest(), paths)
        named = zip(hashes, paths, strict=True)
        images = {f"{key}-{file.relative_to(path)}": partial(Image.open, file) for key, file in named}
    else:
        try:
            archive = zipfile.ZipFile(path)  # one for all threads: loading its directory takes a second
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): expected a folder or .zip of images, or an .npz with "
                             "mu and sigma") from error  # fmt: skip
        infos = {Path(info.filename): info for info in archive.infolist() if not info.is_dir()}
        images = {f"{infos[file].CRC:08x}-{infos[file].filename}":
                  lambda info=infos[file]: Image.open(io.BytesIO(archive.read(info)))
                  for file in _images(sorted(infos), path)}  # fmt: skip
    if not images:
        raise ValueError(f"{path} has no images: expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    return images


def _images(files: Sequence[Path], source: Path) -> list[Path]:
    """Those that are images by their names; the number of the others is printed."""
    others = [file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        print(
            f"{source.name}: {len(files) - len(others)} images; {len(others)} other files not used, such as {others[0]}"
        )
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
