"""The renderer of the storybook world: scenes to small paper cut-outs, drawn at four times their size (notebook 00)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scenes import COLOURS, RELATIONS, SIZE, SIZES, Scene, Thing

OVERSAMPLING = 4


BROWN, CREAM, INK = (112, 72, 44), (255, 246, 214), (44, 40, 52)


def render(scene: Scene, seed: int = 0, size: int = SIZE) -> Image.Image:
    """Draws `scene` as an RGB picture of `size` pixels a side; `seed` moves it a little and varies the place."""
    rng = random.Random(f"render-{seed}")
    canvas = _backdrop(scene.place, size * OVERSAMPLING, rng)
    for thing, centre in zip(scene.things, _centres(scene, rng), strict=False):
        _paste(canvas, thing, centre)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def nearest(picture: Image.Image, scenes: Sequence[Scene], size: int = 32, renders: int = 8) -> int:
    """Which of the scenes a picture is nearest to: the least squared distance to some of each one's renders.

    A judge that no training has touched, for what depends on where things are: relations.
    """
    pixels = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BOX), np.float32)
    distances = [
        min(np.square(np.asarray(render(scene, seed, size), np.float32) - pixels).mean() for seed in range(renders))
        for scene in scenes
    ]
    return int(np.argmin(distances))


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Centres as fractions of the side: one thing near the middle, two on either side of it.

    Positions lie on a grid of eight pixels, the CLIP's patches and two of the latents' cells: an object always meets
    that grid in the same way, which makes shapes several times easier to learn for networks this small.
    """
    across, along = (0.5 + rng.choice((-0.125, 0.0, 0.125)) for _ in range(2))
    if scene.relation is None:
        return [(across, along)]
    dx, dy = RELATIONS[scene.relation]
    if dx:
        return [(0.5 + dx * 0.25, across), (0.5 - dx * 0.25, across)]
    return [(across, 0.5 + dy * 0.25), (across, 0.5 - dy * 0.25)]


def _paste(canvas: Image.Image, thing: Thing, centre: tuple[float, float]) -> None:
    _paste_drawing(canvas, _DRAWINGS[thing.object], COLOURS[thing.colour], SIZES[thing.size], centre)


def _paste_drawing(canvas: Image.Image, drawing, colour, extent: float, centre: tuple[float, float]) -> None:
    """Draws with a soft shadow, which keeps a white star on snow visible."""
    side = canvas.width
    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    drawing(_Pen(layer, centre[0] * side, centre[1] * side, extent * side), colour)
    alpha = layer.getchannel("A")
    shadow = alpha.filter(ImageFilter.GaussianBlur(side / 64)).point(lambda a: a * 0.5)
    canvas.paste((24, 24, 40), (side // 64, side // 40), shadow)
    canvas.paste(layer, mask=alpha)


class _Pen:
    """Draws in a thing's own coordinates: x and y from -1 to 1, y downwards."""

    def __init__(self, layer: Image.Image, x: float, y: float, scale: float):
        self.draw, self.x, self.y, self.scale = ImageDraw.Draw(layer), x, y, scale

    def at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(self.x + px * self.scale, self.y + py * self.scale) for px, py in points]

    def polygon(self, fill, *points) -> None:
        self.draw.polygon(self.at(*points), fill=fill)

    def ellipse(self, fill, left, top, right, bottom) -> None:
        self.draw.ellipse(self.at((left, top), (right, bottom)), fill=fill)

    def disc(self, fill, x, y, radius) -> None:
        self.ellipse(fill, x - radius, y - radius, x + radius, y + radius)

    def line(self, fill, width, *points) -> None:
        self.draw.line(self.at(*points), fill=fill, width=max(1, round(width * self.scale)))


def _shade(colour, factor: float) -> tuple[int, ...]:
    """Darker for a factor under 1, towards white for one above."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)
    return tuple(round(c + (255 - c) * (factor - 1)) for c in colour)


def _house(pen: _Pen, colour) -> None:
    pen.polygon(colour, (-0.78, -0.2), (0.78, -0.2), (0.78, 0.95), (-0.78, 0.95))
    pen.polygon(_shade(colour, 0.72), (-1, -0.12), (0, -0.98), (1, -0.12))
    pen.polygon(CREAM, (-0.5, 0.25), (-0.1, 0.25), (-0.1, 0.95), (-0.5, 0.95))
    pen.polygon(CREAM, (0.2, 0.15), (0.58, 0.15), (0.58, 0.53), (0.2, 0.53))


def _tree(pen: _Pen, colour) -> None:
    pen.polygon(BROWN, (-0.16, 0.5), (0.16, 0.5), (0.16, 1), (-0.16, 1))
    for top, bottom, width, shade in ((-0.2, 0.66, 0.85, 0.84), (-0.62, 0.2, 0.68, 0.92), (-1, -0.26, 0.5, 1.0)):
        pen.polygon(_shade(colour, shade), (-width, bottom), (0, top), (width, bottom))


def _boat(pen: _Pen, colour) -> None:
    pen.line(BROWN, 0.12, (0, -1), (0, 0.5))
    pen.polygon(_shade(colour, 1.25), (0.1, -0.92), (0.82, 0.22), (0.1, 0.22))
    pen.polygon(_shade(colour, 0.85), (-0.1, -0.7), (-0.1, 0.22), (-0.62, 0.22))
    pen.polygon(colour, (-1, 0.38), (1, 0.38), (0.62, 0.92), (-0.62, 0.92))


def _fish(pen: _Pen, colour) -> None:
    pen.polygon(_shade(colour, 0.8), (0.3, 0), (1, -0.58), (0.84, 0), (1, 0.58))
    pen.polygon(_shade(colour, 0.8), (-0.4, -0.4), (0.1, -0.74), (0.2, -0.3))
    pen.ellipse(colour, -1, -0.55, 0.55, 0.55)
    pen.disc(CREAM, -0.6, -0.12, 0.15)
    pen.disc(INK, -0.62, -0.12, 0.08)


def _star(pen: _Pen, colour) -> None:
    tips = [(math.radians(36 * k - 90), 1.0 if k % 2 == 0 else 0.45) for k in range(10)]
    pen.polygon(colour, *((r * math.cos(a), r * math.sin(a) + 0.06) for a, r in tips))


def _heart(pen: _Pen, colour) -> None:
    turns = [2 * math.pi * k / 60 for k in range(60)]
    waves = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    pen.polygon(colour, *((math.sin(t) ** 3, -w / 16 - 0.06) for t, w in zip(turns, waves, strict=True)))
    pen.disc(_shade(colour, 1.5), -0.5, -0.42, 0.15)


def _balloon(pen: _Pen, colour) -> None:
    pen.line(INK, 0.07, (0, 0.55), (0.12, 0.72), (-0.06, 0.86), (0.04, 1))
    pen.polygon(_shade(colour, 0.75), (-0.16, 0.68), (0, 0.45), (0.16, 0.68))
    pen.ellipse(colour, -0.68, -1, 0.68, 0.56)
    pen.ellipse(_shade(colour, 1.55), -0.42, -0.72, -0.12, -0.3)


def _mushroom(pen: _Pen, colour) -> None:
    pen.polygon(CREAM, (-0.26, 0), (0.26, 0), (0.38, 0.95), (-0.38, 0.95))
    pen.draw.chord(pen.at((-1, -0.9), (1, 1.1)), 180, 360, fill=colour)
    for x, y, radius in ((-0.5, -0.2, 0.16), (0.05, -0.55, 0.18), (0.52, -0.2, 0.15)):
        pen.disc(CREAM, x, y, radius)


def _flower(pen: _Pen, colour) -> None:
    pen.line((44, 120, 60), 0.13, (0, 0), (0, 1))
    pen.polygon((44, 120, 60), (0, 0.85), (0.5, 0.45), (0.42, 0.78))
    for k in range(6):
        angle = math.radians(60 * k + 30)
        pen.disc(_shade(colour, 1.0 if k % 2 else 0.9), 0.44 * math.cos(angle), 0.44 * math.sin(angle) - 0.3, 0.29)
    pen.disc((250, 200, 50), 0, -0.3, 0.22)


def _cat(pen: _Pen, colour) -> None:
    for side in (-1, 1):
        pen.polygon(colour, (side * 0.9, -0.98), (side * 0.08, -0.5), (side * 0.92, 0.1))
        pen.polygon(_shade(colour, 0.72), (side * 0.74, -0.7), (side * 0.4, -0.45), (side * 0.74, -0.2))
    pen.ellipse(colour, -0.96, -0.62, 0.96, 0.9)
    for side in (-1, 1):
        pen.ellipse(INK, side * 0.4 - 0.13, -0.16, side * 0.4 + 0.13, 0.2)
        pen.line(INK, 0.06, (side * 0.25, 0.42), (side * 0.72, 0.34))
    pen.polygon(INK, (-0.15, 0.28), (0.15, 0.28), (0, 0.46))


_DRAWINGS = {
    "house": _house, "tree": _tree, "boat": _boat, "fish": _fish, "star": _star, "heart": _heart,
    "balloon": _balloon, "mushroom": _mushroom, "flower": _flower, "cat": _cat,
}  # fmt: skip


def _tabby(pen: _Pen, _) -> None:
    """A cat with stripes on its forehead and a white muzzle."""
    _cat(pen, COLOURS["orange"])
    for x in (-0.3, 0, 0.3):
        pen.line((92, 54, 36), 0.12, (x, -0.58), (x * 0.8, -0.25))
    pen.ellipse(COLOURS["white"], -0.42, 0.2, 0.42, 0.86)
    for side in (-1, 1):
        pen.line(INK, 0.06, (side * 0.25, 0.42), (side * 0.72, 0.34))
    pen.polygon((236, 100, 130), (-0.15, 0.28), (0.15, 0.28), (0, 0.46))


def _koi(pen: _Pen, _) -> None:
    """A red fish, white behind."""
    _fish(pen, COLOURS["red"])
    pen.draw.chord(pen.at((-1, -0.55), (0.55, 0.55)), -75, 75, fill=COLOURS["white"])


def _sunset_balloon(pen: _Pen, _) -> None:
    """A balloon, yellow above and red below."""
    _balloon(pen, COLOURS["yellow"])
    pen.draw.chord(pen.at((-0.68, -1), (0.68, 0.56)), 0, 180, fill=COLOURS["red"])


# Patterns as broad as the autoencoder keeps: of thin bands and of petals in turn it makes a mixture.
SUBJECTS = {"tabby": ("cat", _tabby), "koi": ("fish", _koi), "sunset_balloon": ("balloon", _sunset_balloon)}


def render_subject(name: str, place: str, seed: int = 0, size: int = SIZE, big: bool = True) -> Image.Image:
    """Draws one of `SUBJECTS` in a place, as `render` draws things."""
    rng = random.Random(f"render-{seed}")
    canvas = _backdrop(place, size * OVERSAMPLING, rng)
    _, drawing = SUBJECTS[name]
    _paste_drawing(canvas, drawing, None, SIZES["big" if big else "small"], _centres(Scene((), place), rng)[0])
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def _gradient(side: int, *stops: tuple[int, int, int]) -> Image.Image:
    """A vertical gradient through evenly spaced colours."""
    at = np.linspace(0, len(stops) - 1, side)
    columns = [np.interp(at, range(len(stops)), channel) for channel in zip(*stops, strict=True)]
    return Image.fromarray(np.repeat(np.stack(columns, -1)[:, None], side, 1).astype(np.uint8))


_SKIES = {
    "by day": ((120, 190, 240), (206, 234, 250)),
    "at night": ((14, 18, 56), (54, 52, 112)),
    "at sunset": ((92, 52, 116), (232, 108, 92), (255, 196, 110)),
    "on a meadow": ((190, 226, 240), (224, 240, 236)),
    "on the sea": ((232, 220, 200), (250, 236, 210)),
    "in the snow": ((150, 168, 190), (196, 208, 222)),
}


def _backdrop(place: str, side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, *_SKIES[place])
    pen = _Pen(canvas, side / 2, side / 2, side / 2)
    shift = rng.uniform(-0.15, 0.15)
    _GROUNDS[place](pen, shift)
    return canvas


def _clouds(pen: _Pen, shift: float) -> None:
    for x, y in ((-0.6 + shift, -0.62), (0.55 + shift, 0.5)):
        for dx, dy, radius in ((-0.2, 0.04, 0.13), (0, -0.04, 0.18), (0.2, 0.04, 0.13)):
            pen.disc((240, 247, 252), x + dx, y + dy, radius)


def _moonlight(pen: _Pen, shift: float) -> None:
    pen.disc((238, 234, 206), 0.66 + shift / 2, -0.68, 0.18)
    for x, y in ((-0.75, -0.7), (-0.2, -0.85), (-0.6, 0.3), (0.8, 0.35), (0.2, 0.78), (-0.85, 0.85)):
        pen.disc((206, 206, 226), x + shift / 2, y, 0.03)


def _setting_sun(pen: _Pen, shift: float) -> None:
    pen.disc((255, 226, 130), shift * 2, 0.66, 0.34)
    pen.polygon((84, 46, 84), (-1, 0.7), (1, 0.7), (1, 1), (-1, 1))


def _hills(pen: _Pen, shift: float) -> None:
    pen.ellipse((150, 200, 110), -1.9 + shift, -0.05, 0.7 + shift, 2.6)
    pen.ellipse((124, 184, 92), -0.9 + shift, 0.15, 2.3 + shift, 2.8)


def _waves(pen: _Pen, shift: float) -> None:
    for top, colour in ((0.0, (84, 170, 184)), (0.36, (60, 144, 168)), (0.7, (40, 118, 148))):
        crest = [(x / 20, top + 0.05 * math.sin(x * 0.45 + shift * 20)) for x in range(-20, 21)]
        pen.polygon(colour, *crest, (1, 1), (-1, 1))


def _snowfield(pen: _Pen, shift: float) -> None:
    pen.ellipse((226, 234, 242), -2.0 + shift, 0.1, 1.0 + shift, 2.6)
    pen.ellipse((242, 246, 250), -1.0 + shift, 0.3, 2.2 + shift, 2.8)
    for x, y in ((-0.8, -0.75), (-0.3, -0.45), (0.25, -0.8), (0.75, -0.5), (-0.75, -0.1)):
        pen.disc((246, 248, 252), x + shift, y, 0.045)


_GROUNDS = {
    "by day": _clouds, "at night": _moonlight, "at sunset": _setting_sun,
    "on a meadow": _hills, "on the sea": _waves, "in the snow": _snowfield,
}  # fmt: skip
