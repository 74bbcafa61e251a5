"""Training images and their captions, of whatever source (notebook 03)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from . import rendering, scenes

EXPECTED = ("a folder of images with a metadata.csv of the columns file_name, text, or with a .txt beside each image; "
            "a folder or pattern of .parquet or .tar shards; or the name of a data set on the Hugging Face hub, which "
            "needs a network. LAION's: python -m bksdm_utils download laion_aes_212k (or _11k, _2256k)")  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One image, opened when needed, and its captions; `key` identifies its content for the cache."""

    name: str
    captions: tuple[str, ...]
    open: Callable[[], Image.Image]
    key: str


Skipped = list[tuple[str, str]]  # (name, reason) of what was set aside


def storybook_examples(num_scenes: int, split: str = "train") -> list[Example]:
    """The first scenes of a storybook split."""
    world = sha256(Path(rendering.__file__).read_bytes() + Path(scenes.__file__).read_bytes()).hexdigest()

    def example(seed: int) -> Example:
        scene, name = scenes.sample_scene(seed, split), f"{split}-{seed}"
        return Example(name, (scene.caption,), lambda: rendering.render(scene, seed), f"{world}-{name}")

    return [example(seed) for seed in range(num_scenes)]


def captions_of(value: object) -> tuple[str, ...]:
    """The one or several captions in a cell of a table; ValueError where there is none, or something else."""
    texts = [_decoded(text) for text in (value if isinstance(value, (list, tuple)) else [value])]
    if wrong := [text for text in texts if not isinstance(text, (str, type(None)))]:
        raise ValueError(f"the caption is {type(wrong[0]).__name__}, not text")
    captions = tuple(text.strip() for text in texts if text and text.strip())
    if not captions:
        raise ValueError("empty caption")
    return captions


def _decoded(text: object) -> object:
    if not isinstance(text, bytes):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("the caption is bytes that are not text in UTF-8") from None
