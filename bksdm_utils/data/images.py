"""Images to tensors (notebooks 03, 05, 06)."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2",
                  ".ppm", ".pgm", ".tga"}  # fmt: skip


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and below it, sorted; links are followed, hidden ones and a folder met before left out."""
    files, met = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))] if real not in met else []
        files += [Path(place, name) for name in names if not name.startswith(".")] if real not in met else []
        met.add(real)
    return sorted(files)


def open_image(cell: dict) -> Image.Image:
    """The image in a cell of a table: bytes, or a path."""
    return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image upright, in RGB with eight bits, on white where it is transparent.

    Raises:
        ValueError: brightness beyond sixteen bits, of which nobody knows what is white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow would clip them to eight bits
        image = Image.fromarray(_eight_bits(np.asarray(image), sixteen=image.mode.startswith("I;16")))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, sixteen: bool) -> np.ndarray:
    most = float(values.max(initial=0))
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or most > 65_535:
        raise ValueError(f"brightness from {values.min()} to {values.max()}: expected 0 to 1, 255 or 65,535")
    if sixteen or most > 255:
        return (values // 256).astype(np.uint8)
    return (values * 255 if most <= 1 and values.dtype.kind == "f" else values).round().astype(np.uint8)


def to_pixels(
    image: Image.Image, resolution: int, centre: tuple[float, float] = (0.5, 0.5), interpolation: str = "bicubic"
) -> torch.Tensor:
    """Any image, as `to_rgb`, to (3, resolution, resolution) in -1 … 1: shorter side scaled, the rest cut off.

    Args:
        centre: where the crop lies in what is too long: 0 left or top, 1 right or bottom.
        interpolation: bicubic or bilinear.
    """
    image = to_rgb(image)
    if image.size != (resolution, resolution):
        method = Image.Resampling[interpolation.upper()]
        image = ImageOps.fit(image, (resolution, resolution), method, centering=centre)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
