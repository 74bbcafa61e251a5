"""Things counted by their colours."""

import math

from PIL import Image

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import Scene, Thing, sample_scene
from bksdm_utils.storybook.scoring import count_thing, drawn_once

PAIR = Scene((Thing("small", "red", "heart"), Thing("small", "blue", "fish")), "on a meadow", "left of")


def test_each_thing_of_a_render_is_counted_once():
    scenes = [sample_scene(seed, "test", 1.0) for seed in range(40)]
    for size in (64, 96):
        assert drawn_once([render(scene, seed, size) for seed, scene in enumerate(scenes)], scenes) == 1


def test_a_thing_drawn_twice_and_a_missing_one_are_noticed():
    image = render(PAIR, 3)
    assert [count_thing(image, PAIR, thing) for thing in PAIR.things] == [1, 1]
    half = image.crop((0, 0, 32, 64))
    twice = Image.new("RGB", image.size)
    twice.paste(half, (0, 0))
    twice.paste(half, (32, 0))
    assert [count_thing(twice, PAIR, thing) for thing in PAIR.things] == [2, 0]
    assert drawn_once([image, twice], [PAIR, PAIR]) == 0.5


def test_what_cannot_be_told_by_colour_is_not_counted():
    alike = Scene(tuple(Thing("big", "red", name) for name in ("heart", "fish")), "on a meadow", "left of")
    assert math.isnan(drawn_once([render(alike)], [alike]))
