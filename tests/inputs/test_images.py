"""Images as people bring them: one function opens all of them, and nothing is clipped or turned black in silence."""

import numpy as np
import pytest
from PIL import Image

from bksdm_utils.data.images import to_pixels, to_rgb
from bksdm_utils.dreambooth.subjects import load_subject

GREY = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


BRIGHTNESS = {
    "eight bits": lambda: Image.fromarray((GREY * 255).astype(np.uint8)),
    "sixteen bits": lambda: Image.fromarray((GREY * 65_535).astype(np.uint16)),
    "whole numbers to 65,535": lambda: Image.fromarray((GREY * 65_535).astype(np.int32)),
    "whole numbers to 255": lambda: Image.fromarray((GREY * 255).astype(np.int32)),
    "fractions to 1": lambda: Image.fromarray(GREY),
    "fractions to 255": lambda: Image.fromarray(GREY * 255),
    "fractions to 65,535": lambda: Image.fromarray(GREY * 65_535),
}


@pytest.mark.parametrize("kind", BRIGHTNESS)
def test_brightness_of_any_depth_keeps_its_range(kind):
    rgb = np.asarray(to_rgb(BRIGHTNESS[kind]()), np.float32)
    assert rgb.shape == (8, 8, 3) and np.abs(rgb[..., 0] - GREY * 255).max() <= 1.01


@pytest.mark.parametrize("values", [GREY * 70_000, GREY - 0.5, np.full((8, 8), np.nan, np.float32)])
def test_brightness_that_nobody_can_place_is_refused(values):
    with pytest.raises(ValueError, match="brightness from .* expected 0 to 1, 255 or 65,535"):
        to_rgb(Image.fromarray(values))


def transparent(mode):
    base = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    base.paste((0, 0, 200, 255), (0, 0, 4, 8))
    if mode == "P":
        palette = base.convert("RGB").convert("P")
        palette.info["transparency"] = palette.getpixel((7, 0))
        return palette
    return base.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode):
    rgb = np.asarray(to_rgb(transparent(mode)))
    assert (rgb[:, 5:] == 255).all() and (rgb[:, :3] < 255).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    picture = Image.new("RGB", (8, 6), "white")
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert to_rgb(Image.open(tmp_path / "turned.jpg")).size == ((8, 6) if orientation < 5 else (6, 8))


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode):
    source = Image.new("L", (8, 8), 255).convert("1") if mode == "1" else Image.new("RGB", (8, 8), "white")
    if mode == "LAB":
        source = Image.fromarray(np.full((8, 8, 3), (255, 128, 128), np.uint8), "LAB")
    elif mode != "1":
        source = source.convert(mode)
    assert tuple(to_pixels(source, 8).shape) == (3, 8, 8)


def test_a_subjects_images_are_opened_by_the_same_rules(tmp_path):
    transparent("RGBA").save(tmp_path / "0.png")
    Image.fromarray((GREY * 65_535).astype(np.uint16)).save(tmp_path / "1.png")
    transparent("RGBA").save(tmp_path / "2.webp", lossless=True)
    (tmp_path / "3.png").write_bytes(b"no image")
    subject = load_subject(str(tmp_path), "dog")
    assert len(subject.images) == 3 and [name for name, _ in subject.skipped] == ["3.png"]
    assert subject.images[0].getpixel((7, 7)) == subject.images[2].getpixel((7, 7)) == (255, 255, 255)
    assert 100 < np.asarray(subject.images[1]).mean() < 150
