"""Features that are computed once and kept, and the real images they are compared with."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.examples import Skipped, storybook_examples
from ..files import in_threads, resolve
from .networks import Network
from .prompts import not_available

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class FeatureCache:
    """Rows of numbers under the hash of what they were computed from: a file that grows, and its index.

    A kill loses the last block at most: what stands in only one of the two files is cut off.
    """

    def __init__(self, folder: Path, dim: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.numbers, self.index, self.dim = folder / "rows.f32", folder / "index.txt", dim
        for path in (self.numbers, self.index):
            path.touch()
        keys = self.index.read_bytes().split(b"\n")[:-1]  # without the last, which is torn or empty
        whole = min(len(keys), self.numbers.stat().st_size // (4 * dim))
        with self.numbers.open("ab") as numbers, self.index.open("ab") as index:
            numbers.truncate(whole * 4 * dim)
            index.truncate(sum(len(key) + 1 for key in keys[:whole]))
        self.place = {key.decode(): i for i, key in enumerate(keys[:whole])}

    def add(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Appends rows, (len(keys), dim)."""
        with self.numbers.open("ab") as numbers, self.index.open("a", encoding="utf-8") as index:
            numbers.write(np.ascontiguousarray(rows, np.float32).tobytes())
            numbers.flush()
            index.write("".join(f"{key}\n" for key in keys))
        for key in keys:
            self.place[key] = len(self.place)

    def all(self) -> np.ndarray:
        """Every row, (N, dim), as a file mapped to memory."""
        shape = (len(self.place), self.dim)
        return np.memmap(self.numbers, np.float32, "r", shape=shape) if self.place else np.zeros(shape, np.float32)

    def where(self, keys: Sequence[str]) -> np.ndarray:
        """The places of these keys among all rows."""
        return np.array([self.place[key] for key in keys], np.int64)


def _progress(total: int, what: str) -> tqdm:
    """A plain line now and then, with an estimate, for work that takes more than ten seconds."""
    return tqdm(total=total, desc=what, file=sys.stdout, mininterval=10, delay=10, ascii=True, ncols=70)


def compute(rows: FeatureCache, network: Network, items: Mapping[str, Callable[[], object]]) -> Skipped:
    """Has the network describe what is not described yet; the next items are prepared while it works.

    Work of more than ten seconds says how far it is.

    Args:
        items: hash -> what opens the picture or gives the text.

    Returns:
        (hash, reason) of what could not be opened.
    """
    failed: Skipped = []
    batch_size = 128 if torch.cuda.is_available() else 32  # a CPU's caches hold few pictures of 299 pixels

    def prepared(key: str) -> tuple[str, torch.Tensor | str]:
        try:
            return key, network.prepare(items[key]())
        except Exception as error:  # Pillow raises many kinds for a broken file
            return key, str(error) or type(error).__name__

    todo = [key for key in items if key not in rows.place]
    ready = in_threads(prepared, todo, ahead=2 * batch_size)
    with _progress(len(todo), network.name) as bar:
        while batch := list(islice(ready, batch_size)):
            failed += [(key, found) for key, found in batch if isinstance(found, str)]
            good = [(key, found) for key, found in batch if not isinstance(found, str)]
            if good:
                with torch.no_grad():
                    rows.add([key for key, _ in good], network.forward(torch.stack([x for _, x in good])).float().cpu())
            bar.update(len(batch))
    return failed


@contextmanager
def real_images(place: str | Path | None, count: int = 1000) -> Iterator[dict[str, Callable[[], Image.Image]]]:
    """Real pictures by the hash of their contents: of a folder or a .zip, or renders of storybook's test scenes.

    They can be opened within the block.

    Args:
        place: None is the storybook.
        count: of storybook's renders.

    Raises:
        Missing: a download that was not fetched yet.
        ValueError: no such file or folder, it cannot be read, or it holds no pictures.
    """
    if place is None:
        yield {example.key: example.open for example in storybook_examples(count, "test")}
        return
    place = _real_place(place)
    with _archive(place) if place.is_file() else nullcontext() as archive:
        found = _images_below(place) if archive is None else _images_in(archive)
        if not found:
            raise ValueError(f"{place} holds no pictures: expected {', '.join(sorted(IMAGE_SUFFIXES))}")
        yield found


def _real_place(place: str | Path) -> Path:
    place = Path(resolve(place))
    if not place.exists():
        raise not_available(place)(
            f"{place} is missing: expected statistics (.npz), a folder or a .zip of real pictures. COCO's come by "
            "python -m bksdm_utils download coco_statistics (or coco_images)"
        )
    return place


def _archive(place: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(place)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{place} cannot be read ({error}): expected an .npz with mu and sigma, a folder or a .zip of "
                         "pictures") from error  # fmt: skip


def _images_below(folder: Path) -> dict[str, Callable[[], Image.Image]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    hashes = in_threads(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), paths)
    return {f"{key}-{path.relative_to(folder)}": partial(Image.open, path)
            for key, path in zip(hashes, paths, strict=True)}  # fmt: skip


def _images_in(archive: zipfile.ZipFile) -> dict[str, Callable[[], Image.Image]]:
    """Opened through the one archive, which several threads may read; its table alone takes a second to load."""
    names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in IMAGE_SUFFIXES)

    def opened(name: str) -> Image.Image:
        return Image.open(io.BytesIO(archive.read(name)))

    return {f"{archive.getinfo(name).CRC:08x}-{name}": partial(opened, name) for name in names}
