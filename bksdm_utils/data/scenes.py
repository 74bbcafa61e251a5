"""The storybook world: scenes and their captions (notebook 00).

One image shows one or two objects, each with a size and a colour, in a place. Everything an image shows is in its
`Scene`, so a caption can be checked exactly.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

SIZE = 64  # pixels, the side of a storybook image
OBJECTS = ("house", "tree", "boat", "fish", "star", "heart", "balloon", "mushroom", "flower", "cat")
COLOURS = {
    "red": (214, 40, 40), "orange": (245, 138, 20), "yellow": (250, 218, 60), "green": (50, 160, 70),
    "blue": (40, 92, 214), "purple": (128, 60, 176), "pink": (246, 140, 190), "white": (250, 250, 250),
}  # fmt: skip
SIZES = {"big": 0.25, "small": 0.16}  # half extent as a fraction of the image's side
PLACES = ("by day", "at night", "at sunset", "on a meadow", "on the sea", "in the snow")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ATTRIBUTES = ("size", "colour", "object", "place")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class World:
    """Settings of a storybook world: the side of its images in pixels, the probability of a second thing."""

    size: int = SIZE
    pair_share: float = 0.4


WORLD = World()  # the committed teacher's


@dataclass(frozen=True)
class Thing:
    """One object of an image, such as a big red house."""

    size: str
    colour: str
    object: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.object}"


@dataclass(frozen=True)
class Scene:
    """What an image shows: a place with no thing, one, or two and the relation of the first to the second."""

    things: tuple[Thing, ...]
    place: str
    relation: str | None = None

    @property
    def caption(self) -> str:
        return f"{f' {self.relation} '.join(map(str, self.things))} {self.place}"

    @property
    def layout(self) -> dict[str | None, Thing]:
        """The things by where they stand: the only one under None, two under a relation and its opposite."""
        return dict(zip((self.relation, OPPOSITE.get(self.relation)), self.things, strict=False))

    def alternatives(self, attribute: str) -> list[Scene]:
        """This scene with each value of `attribute` (of its first thing, or "place", "relation"), itself included."""
        if attribute == "place":
            return [replace(self, place=place) for place in PLACES]
        if attribute == "relation":
            return [replace(self, relation=relation) for relation in RELATIONS]
        values = {"size": SIZES, "colour": COLOURS, "object": OBJECTS}[attribute]
        first, *rest = self.things
        return [replace(self, things=(replace(first, **{attribute: value}), *rest)) for value in values]


_ALL = list(itertools.product(OBJECTS, COLOURS, PLACES))
random.Random(2305).shuffle(_ALL)
COMBINATIONS = {"test": _ALL[:48], "validation": _ALL[48:72], "train": _ALL[72:]}  # (object, colour, place)


def sample_scene(seed: int, split: str = "train", pair_share: float = WORLD.pair_share) -> Scene:
    """A scene whose (object, colour, place) combinations all belong to `split`, the same for the same arguments.

    Args:
        split: one of `SPLITS`; validation and test combinations never occur in training.
        pair_share: probability of a second object.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}-{seed}")
    obj, colour, place = rng.choice(COMBINATIONS[split])
    first = Thing(rng.choice(list(SIZES)), colour, obj)
    others = [c for c in COMBINATIONS[split] if c[2] == place and c[0] != obj]
    if rng.random() >= pair_share or not others:
        return Scene((first,), place)
    other, other_colour, _ = rng.choice(others)
    second = Thing(rng.choice(list(SIZES)), other_colour, other)
    return Scene((first, second), place, rng.choice(list(RELATIONS)))
