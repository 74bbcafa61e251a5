"""Protocols: what the metric networks see of an image, which networks they are, and the real images (notebook 04)."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..data.downloads import DOWNLOADS, VIT_G
from .networks import Network, inception_classes, inception_clean, inception_pytorch


def as_stored(image: Image.Image) -> Image.Image:
    """The image itself."""
    return image


def as_paper(image: Image.Image) -> Image.Image:
    """What the paper's scores are of: JPEG of quality 75, Pillow's bicubic to 256 pixels, JPEG of quality 75 again.

    A file that is a JPEG already is not compressed once more before it is made smaller.
    """
    if image.format != "JPEG":
        image = _jpeg(image.convert("RGB"))
    return _jpeg(image.resize((256, 256), Image.Resampling.BICUBIC))


def _jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file)


@dataclass(frozen=True)
class Protocol:
    """How images are scored.

    Attributes:
        view: what the networks see of a stored image.
        clip: the CLIP model of the CLIP score; for storybook it gives the other scores' features too.
        features: makes the network of FID and KID; None is the CLIP model.
        classes: makes the network of the Inception score; None is the CLIP model.
        real: the real images, where no others are named; None is storybook's renders.
    """

    name: str
    view: Callable[[Image.Image], Image.Image]
    clip: str
    features: Callable[[str], Network] | None = None
    classes: Callable[[str], Network] | None = None
    real: str | None = None


STATISTICS, IMAGES = DOWNLOADS["coco_statistics"].path, DOWNLOADS["coco_images"].path
PROTOCOLS = {
    "paper": Protocol("paper", as_paper, VIT_G, inception_pytorch, inception_classes, STATISTICS),
    # The paper's statistics are of another network and of 256 pixels: here features of COCO's own images are computed.
    "clean": Protocol("clean", as_stored, VIT_G, inception_clean, inception_classes, IMAGES),
    "storybook": Protocol("storybook", as_stored, "data/storybook/clip"),
}
