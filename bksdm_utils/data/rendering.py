"""The renderer of the storybook world: scenes to small paper cut-outs, drawn at four times their size (notebook 00)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import cos, pi, radians, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scenes import COLOURS, RELATIONS, SIZE, SIZES, Scene

OVERSAMPLING = 4
BROWN, CREAM, INK, GREEN, MUZZLE = (112, 72, 44), (255, 246, 214), (44, 40, 52), (44, 120, 60), (236, 100, 130)


def render(scene: Scene, seed: int = 0, size: int = SIZE) -> Image.Image:
    """Draws `scene` as an RGB image of `size` pixels a side; `seed` moves it a little and varies the place."""
    things = [(_THINGS[thing.object], COLOURS[thing.colour], SIZES[thing.size]) for thing in scene.things]
    return _render(scene, things, seed, size)


def render_subject(name: str, place: str, seed: int = 0, size: int = SIZE, big: bool = True) -> Image.Image:
    """Draws one of `SUBJECTS` in a place, as `render` draws things."""
    thing, (colour, pattern) = SUBJECTS[name]
    things = [([*_THINGS[thing], *pattern], COLOURS[colour], SIZES["big" if big else "small"])]
    return _render(Scene((), place), things, seed, size)


def _render(scene: Scene, things: Sequence[tuple], seed: int, size: int) -> Image.Image:
    """Draws things, each (shapes, colour, extent), in a scene's place."""
    rng = random.Random(f"render-{seed}")
    canvas = _backdrop(scene.place, size * OVERSAMPLING, rng)
    for thing, centre in zip(things, _centres(scene, rng), strict=False):
        _paste(canvas, *thing, centre)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


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


def _paste(canvas: Image.Image, shapes: Sequence[tuple], colour, extent: float, centre: tuple[float, float]) -> None:
    """Draws with a soft shadow, which keeps a white star on snow visible."""
    side = canvas.width
    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    _Pen(layer, centre[0] * side, centre[1] * side, extent * side, colour).draw(shapes)
    alpha = layer.getchannel("A")
    shadow = alpha.filter(ImageFilter.GaussianBlur(side / 64)).point(lambda a: a * 0.5)
    canvas.paste((24, 24, 40), (side // 64, side // 40), shadow)
    canvas.paste(layer, mask=alpha)


def _backdrop(place: str, side: int, rng: random.Random) -> Image.Image:
    """The empty place: a vertical gradient through evenly spaced colours, and what belongs to the place."""
    sky, ground = _PLACES[place]
    at = np.linspace(0, len(sky) - 1, side)
    columns = [np.interp(at, range(len(sky)), channel) for channel in zip(*sky, strict=True)]
    canvas = Image.fromarray(np.repeat(np.stack(columns, -1)[:, None], side, 1).astype(np.uint8))
    _Pen(canvas, side / 2, side / 2, side / 2).draw(ground(rng.uniform(-0.15, 0.15)))
    return canvas


class _Pen:
    """Draws shapes in a thing's own coordinates: x and y from -1 to 1, y downwards.

    A shape is (kind, fill, *geometry). Its fill is a colour, or a factor for the shade of the thing's colour.
    """

    def __init__(self, layer: Image.Image, x: float, y: float, scale: float, colour: tuple[int, ...] = ()):
        self.image, self.x, self.y, self.scale, self.colour = ImageDraw.Draw(layer), x, y, scale, colour

    def draw(self, shapes: Sequence[tuple]) -> None:
        for kind, fill, *geometry in shapes:
            getattr(self, kind)(fill if isinstance(fill, tuple) else self.shade(fill), *geometry)

    def shade(self, factor: float) -> tuple[int, ...]:
        """Darker for a factor under 1, towards white for one above."""
        if factor <= 1:
            return tuple(round(c * factor) for c in self.colour)
        return tuple(round(c + (255 - c) * (factor - 1)) for c in self.colour)

    def at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(self.x + px * self.scale, self.y + py * self.scale) for px, py in points]

    def polygon(self, fill, *points) -> None:
        self.image.polygon(self.at(*points), fill=fill)

    def ellipse(self, fill, left, top, right, bottom) -> None:
        self.image.ellipse(self.at((left, top), (right, bottom)), fill=fill)

    def chord(self, fill, left, top, right, bottom, start, end) -> None:
        self.image.chord(self.at((left, top), (right, bottom)), start, end, fill=fill)

    def disc(self, fill, x, y, radius) -> None:
        self.ellipse(fill, x - radius, y - radius, x + radius, y + radius)

    def line(self, fill, width, *points) -> None:
        self.image.line(self.at(*points), fill=fill, width=max(1, round(width * self.scale)))


_STAR = [(radians(36 * k - 90), 1.0 if k % 2 == 0 else 0.45) for k in range(10)]
_HEART = [2 * pi * k / 60 for k in range(60)]
_PETALS = [(1.0 if k % 2 else 0.9, radians(60 * k + 30)) for k in range(6)]
_CREST = range(-20, 21)
_THINGS = {
    "house": [
        ("polygon", 1, (-0.78, -0.2), (0.78, -0.2), (0.78, 0.95), (-0.78, 0.95)),
        ("polygon", 0.72, (-1, -0.12), (0, -0.98), (1, -0.12)),
        ("polygon", CREAM, (-0.5, 0.25), (-0.1, 0.25), (-0.1, 0.95), (-0.5, 0.95)),
        ("polygon", CREAM, (0.2, 0.15), (0.58, 0.15), (0.58, 0.53), (0.2, 0.53)),
    ],
    "tree": [
        ("polygon", BROWN, (-0.16, 0.5), (0.16, 0.5), (0.16, 1), (-0.16, 1)),
        ("polygon", 0.84, (-0.85, 0.66), (0, -0.2), (0.85, 0.66)),
        ("polygon", 0.92, (-0.68, 0.2), (0, -0.62), (0.68, 0.2)),
        ("polygon", 1.0, (-0.5, -0.26), (0, -1), (0.5, -0.26)),
    ],
    "boat": [
        ("line", BROWN, 0.12, (0, -1), (0, 0.5)),
        ("polygon", 1.25, (0.1, -0.92), (0.82, 0.22), (0.1, 0.22)),
        ("polygon", 0.85, (-0.1, -0.7), (-0.1, 0.22), (-0.62, 0.22)),
        ("polygon", 1, (-1, 0.38), (1, 0.38), (0.62, 0.92), (-0.62, 0.92)),
    ],
    "fish": [
        ("polygon", 0.8, (0.3, 0), (1, -0.58), (0.84, 0), (1, 0.58)),
        ("polygon", 0.8, (-0.4, -0.4), (0.1, -0.74), (0.2, -0.3)),
        ("ellipse", 1, -1, -0.55, 0.55, 0.55),
        ("disc", CREAM, -0.6, -0.12, 0.15), ("disc", INK, -0.62, -0.12, 0.08),
    ],
    "star": [("polygon", 1, *((r * cos(a), r * sin(a) + 0.06) for a, r in _STAR))],
    "heart": [
        ("polygon", 1, *((sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.06)
                         for t in _HEART)),
        ("disc", 1.5, -0.5, -0.42, 0.15),
    ],
    "balloon": [
        ("line", INK, 0.07, (0, 0.55), (0.12, 0.72), (-0.06, 0.86), (0.04, 1)),
        ("polygon", 0.75, (-0.16, 0.68), (0, 0.45), (0.16, 0.68)),
        ("ellipse", 1, -0.68, -1, 0.68, 0.56), ("ellipse", 1.55, -0.42, -0.72, -0.12, -0.3),
    ],
    "mushroom": [
        ("polygon", CREAM, (-0.26, 0), (0.26, 0), (0.38, 0.95), (-0.38, 0.95)),
        ("chord", 1, -1, -0.9, 1, 1.1, 180, 360),
        ("disc", CREAM, -0.5, -0.2, 0.16), ("disc", CREAM, 0.05, -0.55, 0.18), ("disc", CREAM, 0.52, -0.2, 0.15),
    ],
    "flower": [
        ("line", GREEN, 0.13, (0, 0), (0, 1)),
        ("polygon", GREEN, (0, 0.85), (0.5, 0.45), (0.42, 0.78)),
        *(("disc", shade, 0.44 * cos(angle), 0.44 * sin(angle) - 0.3, 0.29) for shade, angle in _PETALS),
        ("disc", (250, 200, 50), 0, -0.3, 0.22),
    ],
    "cat": [
        ("polygon", 1, (-0.9, -0.98), (-0.08, -0.5), (-0.92, 0.1)),
        ("polygon", 0.72, (-0.74, -0.7), (-0.4, -0.45), (-0.74, -0.2)),
        ("polygon", 1, (0.9, -0.98), (0.08, -0.5), (0.92, 0.1)),
        ("polygon", 0.72, (0.74, -0.7), (0.4, -0.45), (0.74, -0.2)),
        ("ellipse", 1, -0.96, -0.62, 0.96, 0.9),
        ("ellipse", INK, -0.4 - 0.13, -0.16, -0.4 + 0.13, 0.2), ("line", INK, 0.06, (-0.25, 0.42), (-0.72, 0.34)),
        ("ellipse", INK, 0.4 - 0.13, -0.16, 0.4 + 0.13, 0.2), ("line", INK, 0.06, (0.25, 0.42), (0.72, 0.34)),
        ("polygon", INK, (-0.15, 0.28), (0.15, 0.28), (0, 0.46)),
    ],
}  # fmt: skip

# Subject: (thing, (colour, pattern)). Patterns as broad as the autoencoder keeps: thin bands become a mixture.
SUBJECTS = {
    "tabby": ("cat", ("orange", [
        *(("line", (92, 54, 36), 0.12, (x, -0.58), (x * 0.8, -0.25)) for x in (-0.3, 0, 0.3)),
        ("ellipse", COLOURS["white"], -0.42, 0.2, 0.42, 0.86),
        *(("line", INK, 0.06, (side * 0.25, 0.42), (side * 0.72, 0.34)) for side in (-1, 1)),
        ("polygon", MUZZLE, (-0.15, 0.28), (0.15, 0.28), (0, 0.46)),
    ])),
    "koi": ("fish", ("red", [("chord", COLOURS["white"], -1, -0.55, 0.55, 0.55, -75, 75)])),
    "sunset_balloon": ("balloon", ("yellow", [("chord", COLOURS["red"], -0.68, -1, 0.68, 0.56, 0, 180)])),
}  # fmt: skip

# Place: (colours of the sky from above, shapes by a random shift).
_PLACES = {
    "by day": (((120, 190, 240), (206, 234, 250)), lambda shift: [
        ("disc", (240, 247, 252), x + dx, y + dy, radius) for x, y in ((-0.6 + shift, -0.62), (0.55 + shift, 0.5))
        for dx, dy, radius in ((-0.2, 0.04, 0.13), (0, -0.04, 0.18), (0.2, 0.04, 0.13))]),
    "at night": (((14, 18, 56), (54, 52, 112)), lambda shift: [
        ("disc", (238, 234, 206), 0.66 + shift / 2, -0.68, 0.18),
        *(("disc", (206, 206, 226), x + shift / 2, y, 0.03) for x, y in (
            (-0.75, -0.7), (-0.2, -0.85), (-0.6, 0.3), (0.8, 0.35), (0.2, 0.78), (-0.85, 0.85)))]),
    "at sunset": (((92, 52, 116), (232, 108, 92), (255, 196, 110)), lambda shift: [
        ("disc", (255, 226, 130), shift * 2, 0.66, 0.34),
        ("polygon", (84, 46, 84), (-1, 0.7), (1, 0.7), (1, 1), (-1, 1))]),
    "on a meadow": (((190, 226, 240), (224, 240, 236)), lambda shift: [
        ("ellipse", (150, 200, 110), -1.9 + shift, -0.05, 0.7 + shift, 2.6),
        ("ellipse", (124, 184, 92), -0.9 + shift, 0.15, 2.3 + shift, 2.8)]),
    "on the sea": (((232, 220, 200), (250, 236, 210)), lambda shift: [
        ("polygon", colour, *((k / 20, top + 0.05 * sin(k * 0.45 + shift * 20)) for k in _CREST), (1, 1), (-1, 1))
        for top, colour in ((0.0, (84, 170, 184)), (0.36, (60, 144, 168)), (0.7, (40, 118, 148)))]),
    "in the snow": (((150, 168, 190), (196, 208, 222)), lambda shift: [
        ("ellipse", (226, 234, 242), -2.0 + shift, 0.1, 1.0 + shift, 2.6),
        ("ellipse", (242, 246, 250), -1.0 + shift, 0.3, 2.2 + shift, 2.8),
        *(("disc", (246, 248, 252), x + shift, y, 0.045) for x, y in (
            (-0.8, -0.75), (-0.3, -0.45), (0.25, -0.8), (0.75, -0.5), (-0.75, -0.1)))]),
}  # fmt: skip
