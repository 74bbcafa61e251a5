"""Protocols: what the metric networks see of an image, which networks they are, and what the real images are."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..data.downloads import DOWNLOADS
from .networks import Network, inception_classes, inception_clean, inception_pytorch


def as_stored(picture: Image.Image) -> Image.Image:
    """The picture itself."""
    return picture


def as_paper(picture: Image.Image) -> Image.Image:
    """What the paper's scores are of: JPEG of quality 75, Pillow's bicubic to 256 pixels, JPEG of quality 75 again.

    A file that is a JPEG already is not compressed once more before it is made smaller.
    """
    if picture.format != "JPEG":
        picture = _jpeg(picture.convert("RGB"))
    return _jpeg(picture.resize((256, 256), Image.Resampling.BICUBIC))


def _jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return Image.open(file)


@dataclass(frozen=True)
class Protocol:
    """How pictures are scored.

    Attributes:
        view: what the networks see of a stored picture.
        clip: the CLIP of the CLIP score; for storybook it gives the other scores' features too.
        features: makes the network of FID and KID; None is the CLIP.
        classes: makes the network of the Inception score; None is the CLIP.
        real: what is compared with unless told otherwise; None is storybook's renders.
        image_format: what pictures are kept in. The paper's view makes JPEGs of them anyway, and these take a third.
    """

    name: str
    view: Callable[[Image.Image], Image.Image]
    clip: str
    features: Callable[[str], Network] | None = None
    classes: Callable[[str], Network] | None = None
    real: str | None = None
    image_format: str = "png"


VIT_G = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"


PROTOCOLS = {
    "paper": Protocol(
        "paper", as_paper, VIT_G, inception_pytorch, inception_classes, DOWNLOADS["coco_statistics"].path, "jpeg"
    ),
    # The paper's statistics are of another network and of 256 pixels: here COCO's own pictures are looked at.
    "clean": Protocol("clean", as_stored, VIT_G, inception_clean, inception_classes, DOWNLOADS["coco_images"].path),
    "storybook": Protocol("storybook", as_stored, "data/storybook/clip"),
}


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
