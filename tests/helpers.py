"""What tests of several rooms share beside the fixtures."""

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation.folders import add_images
from bksdm_utils.evaluation.prompts import Prompt
from bksdm_utils.files import write_json


def fill_folder(folder, images, image_format="png", settings=None):
    """A folder of images as `sample_folder` leaves it; `images` is id -> (text, image). Returns the prompts."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_json(folder / "sampling.json", settings or {"model": "m", "image_format": image_format})
    pairs = [(Prompt(id, text), image) for id, (text, image) in images.items()]
    add_images(folder, pairs, [0] * len(pairs), image_format)
    return [prompt for prompt, _ in pairs]


def renders(count, seed=1000):
    """Storybook's first test scenes: id -> (caption, render)."""
    scenes = {f"test-{i}": sample_scene(i, "test") for i in range(count)}
    return {id: (scene.caption, render(scene, seed + i)) for i, (id, scene) in enumerate(scenes.items())}
