"""What tests of several rooms share beside the fixtures, and what their processes import."""

import json
import os
import signal
from itertools import count
from pathlib import Path

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation.folders import sample, write_image
from bksdm_utils.evaluation.prompts import Prompt
from bksdm_utils.files import write_json


def fill_folder(folder, images, image_format="png", settings=None):
    """A folder of images as `sample_folder` leaves it; `images` is id -> (text, image). Returns the prompts."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path, prompts = folder / "sampling.json", [Prompt(id, text) for id, (text, _) in images.items()]
    before = json.loads(path.read_text())["texts"] if path.exists() else {}
    texts = before | {prompt.id: prompt.text for prompt in prompts}
    write_json(path, {**(settings or {"model": "m", "image_format": image_format}), "texts": texts})
    for id, (_, image) in images.items():
        write_image(folder, id, image, image_format)
    return prompts


def renders(count, seed=1000):
    """Storybook's first test scenes: id -> (caption, render)."""
    scenes = {f"test-{i}": sample_scene(i, "test") for i in range(count)}
    return {id: (scene.caption, render(scene, seed + i)) for i, (id, scene) in enumerate(scenes.items())}


def stop_at(step, stop):
    """An `os.replace` that calls `stop` at a step of writing: before a half-written file is renamed, or after it."""
    steps, replace = count(), os.replace

    def stopping_replace(source, target):
        if next(steps) == step:
            Path(source).write_bytes(Path(source).read_bytes()[:100])
            stop()
        replace(source, target)
        if next(steps) == step:
            stop()

    return stopping_replace


def kill_at(step, config, folder):
    """Samples a folder and kills this process at a step of writing."""
    os.replace = stop_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sample(config, folder)
