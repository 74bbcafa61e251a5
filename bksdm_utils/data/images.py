"""Images to tensors (notebooks 03, 05, 06)."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps


def open_image(cell: dict) -> Image.Image:
    """The image in a cell of a table: bytes, or a path."""
    return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """Any image to (3, resolution, resolution) in -1 … 1: upright, RGB on white, shorter side scaled, centre crop."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip sixteen bits to eight, mostly to white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
