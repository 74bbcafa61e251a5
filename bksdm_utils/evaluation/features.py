"""Features that are computed once and kept, and the real images that generated ones are compared with (notebook 04)."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from ..data.examples import Skipped, storybook_examples
from ..files import in_threads, resolve
from .networks import Network
from .prompts import not_available

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
Openers = Mapping[str, Callable[[], object]]  # hash -> what opens the image or gives the text


class FeatureCache:
    """Feature rows by the hash of what they were computed from, in a file for each batch, written as a whole."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, {}
        for path in sorted(folder.glob("*.safetensors")):
            self.rows |= load_file(path)

    def add(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Keeps rows, (len(keys), D)."""
        new = dict(zip(keys, rows, strict=True))
        path = self.folder / f"{len(self.rows):09d}.safetensors"
        save_file(new, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        self.rows |= new

    def of(self, keys: Sequence[str]) -> np.ndarray:
        """The rows of these keys, (len(keys), D)."""
        return np.stack([self.rows[key] for key in keys])


def compute(cache: FeatureCache, network: Network, items: Openers) -> Skipped:
    """Adds the features that the cache lacks; the next items are prepared while the network computes.

    A progress bar with an estimate appears after ten seconds.

    Returns:
        (hash, reason) of what could not be opened.
    """
    failed: Skipped = []
    batch_size = 128 if torch.cuda.is_available() else 32  # more images of 299 pixels would not fit a CPU's caches

    def prepared(key: str) -> tuple[str, torch.Tensor | str]:
        try:
            return key, network.prepare(items[key]())
        except Exception as error:  # Pillow raises many kinds for a broken file
            return key, str(error) or type(error).__name__

    missing = [key for key in items if key not in cache.rows]
    ready = in_threads(prepared, missing, ahead=2 * batch_size)
    look = {"file": sys.stdout, "mininterval": 10, "delay": 10, "ascii": True, "ncols": 70}
    with tqdm(total=len(missing), desc=network.name, **look) as bar:
        while batch := list(islice(ready, batch_size)):
            failed += [(key, reason) for key, reason in batch if isinstance(reason, str)]
            if good := {key: tensor for key, tensor in batch if not isinstance(tensor, str)}:
                with torch.no_grad():
                    rows = network.forward(torch.stack(list(good.values())))
                cache.add(list(good), rows.float().cpu().numpy())
            bar.update(len(batch))
    return failed


@contextmanager
def real_images(path: str | Path | None, count: int = 1000) -> Iterator[Openers]:
    """Real images by the hash of their contents: of a folder or a .zip, or renders of storybook's test scenes.

    They can be opened within the block.

    Args:
        path: None is the storybook.
        count: of storybook's renders.

    Raises:
        NotAvailable: a download that is missing.
        ValueError: no such file or folder, it cannot be read, or it has no images.
    """
    if path is None:
        yield {example.key: example.open for example in storybook_examples(count, "test")}
    elif (path := find_real(path)).is_dir():
        yield _not_empty(path, _images_below(path))
    else:
        with _archive(path) as archive:
            yield _not_empty(path, _images_in(archive))


def find_real(path: str | Path) -> Path:
    """The file or folder of real images or of their statistics. Raises as `real_images`."""
    path = Path(resolve(path))
    if not path.exists():
        raise not_available(path)(
            f"{path} is missing: expected statistics (.npz), a folder or a .zip of real images. COCO's: "
            "python -m bksdm_utils download coco_statistics (or coco_images)"
        )
    return path


def _not_empty(path: Path, images: Openers) -> Openers:
    if not images:
        raise ValueError(f"{path} has no images: expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    return images


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected a folder or .zip of images, or an .npz with "
                         "mu and sigma") from error  # fmt: skip


def _images_below(folder: Path) -> Openers:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    hashes = in_threads(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), paths)
    return {f"{key}-{path.relative_to(folder)}": partial(Image.open, path)
            for key, path in zip(hashes, paths, strict=True)}  # fmt: skip


def _images_in(archive: zipfile.ZipFile) -> Openers:
    """Opened through the one archive, which several threads may read: loading its directory takes a second."""
    names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    return {f"{archive.getinfo(name).CRC:08x}-{name}": lambda name=name: Image.open(io.BytesIO(archive.read(name)))
            for name in names}  # fmt: skip
