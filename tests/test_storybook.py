import numpy as np
import pytest

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import (
    ATTRIBUTES,
    COLOURS,
    COMBINATIONS,
    OBJECTS,
    PLACES,
    SIZES,
    Scene,
    Thing,
    sample_scene,
)


def test_a_seed_draws_the_same_picture_and_caption_again():
    first, second = (sample_scene(5) for _ in range(2))
    assert first == second
    assert np.array_equal(render(first, 5), render(second, 5))


def test_the_world_is_as_large_as_promised():
    assert len(OBJECTS) >= 10 and len(COLOURS) >= 8
    assert len(SIZES) == 2 and len(PLACES) >= 6


def test_no_combination_of_a_held_out_split_is_drawn_in_training():
    held_out = set(COMBINATIONS["test"]) | set(COMBINATIONS["validation"])
    scenes = [sample_scene(seed, "train") for seed in range(2000)]
    drawn = {(thing.object, thing.colour, scene.place) for scene in scenes for thing in scene.things}
    assert not drawn & held_out
    assert len(drawn) > 350
    assert not set(COMBINATIONS["test"]) & set(COMBINATIONS["validation"])


def test_held_out_splits_name_every_object_colour_and_place():
    for position, words in enumerate((OBJECTS, COLOURS, PLACES)):
        assert {combination[position] for combination in COMBINATIONS["test"]} == set(words)


def test_a_caption_says_everything():
    scene = Scene((Thing("big", "white", "star"), Thing("small", "green", "flower")), "on a meadow", "left of")
    assert scene.caption == "a big white star left of a small green flower on a meadow"


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "relation"])
def test_alternatives_hold_the_truth_and_differ_in_one_word(attribute):
    scene = Scene((Thing("big", "white", "star"), Thing("small", "green", "flower")), "on a meadow", "left of")
    options = scene.alternatives(attribute)
    assert options.count(scene) == 1 and len({option.caption for option in options}) == len(options)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_of_an_attribute_looks_different(attribute):
    scene = Scene((Thing("big", "red", "house"),), "by day")
    pictures = [np.asarray(render(option)).astype(int) for option in scene.alternatives(attribute)]
    for i, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 1 for other in pictures[:i])


def test_an_object_is_seen_even_in_its_places_own_colour():
    empty = np.asarray(render(Scene((), "in the snow"), 1)).astype(int)
    star = np.asarray(render(Scene((Thing("big", "white", "star"),), "in the snow"), 1)).astype(int)
    assert np.abs(star - empty).mean() > 2


def test_the_left_thing_is_at_the_left():
    pair = (Thing("big", "red", "heart"), Thing("big", "blue", "heart"))
    picture = np.asarray(render(Scene(pair, "on a meadow", "left of"), 2)).astype(int)
    redness = picture[..., 0] - picture[..., 2]
    assert redness[:, :32].mean() > redness[:, 32:].mean() + 20


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        sample_scene(0, "tset")
