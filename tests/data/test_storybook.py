import numpy as np
import pytest

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import ATTRIBUTES, COLOURS, COMBINATIONS, OBJECTS, PLACES, Scene, Thing, sample_scene


def test_a_seed_gives_the_same_scene_and_image_again():
    first, second = (sample_scene(5) for _ in range(2))
    assert first == second
    assert np.array_equal(render(first, 5), render(second, 5))


def test_training_has_no_held_out_combination():
    held_out = set(COMBINATIONS["test"]) | set(COMBINATIONS["validation"])
    scenes = [sample_scene(seed, "train") for seed in range(2000)]
    used = {(thing.object, thing.colour, scene.place) for scene in scenes for thing in scene.things}
    assert not used & held_out
    assert len(used) > 350
    assert not set(COMBINATIONS["test"]) & set(COMBINATIONS["validation"])


def test_held_out_splits_have_every_object_colour_and_place():
    for position, words in enumerate((OBJECTS, COLOURS, PLACES)):
        assert {combination[position] for combination in COMBINATIONS["test"]} == set(words)


def test_a_caption_names_everything_in_the_scene():
    scene = Scene((Thing("big", "white", "star"), Thing("small", "green", "flower")), "on a meadow", "left of")
    assert scene.caption == "a big white star left of a small green flower on a meadow"


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "relation"])
def test_alternatives_contain_the_scene_and_differ_in_one_attribute(attribute):
    scene = Scene((Thing("big", "white", "star"), Thing("small", "green", "flower")), "on a meadow", "left of")
    options = scene.alternatives(attribute)
    assert options.count(scene) == 1 and len({option.caption for option in options}) == len(options)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_of_an_attribute_looks_different(attribute):
    scene = Scene((Thing("big", "red", "house"),), "by day")
    images = [np.asarray(render(option)).astype(int) for option in scene.alternatives(attribute)]
    for i, one in enumerate(images):
        assert all(np.abs(one - other).mean() > 1 for other in images[:i])


def test_a_white_star_is_visible_on_snow():
    empty = np.asarray(render(Scene((), "in the snow"), 1)).astype(int)
    star = np.asarray(render(Scene((Thing("big", "white", "star"),), "in the snow"), 1)).astype(int)
    assert np.abs(star - empty).mean() > 2


def test_the_left_thing_is_on_the_left():
    pair = (Thing("big", "red", "heart"), Thing("big", "blue", "heart"))
    image = np.asarray(render(Scene(pair, "on a meadow", "left of"), 2)).astype(int)
    redness = image[..., 0] - image[..., 2]
    assert redness[:, :32].mean() > redness[:, 32:].mean() + 20


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        sample_scene(0, "tset")
