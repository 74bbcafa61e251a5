"""What tests of several rooms share beside the fixtures, and what their processes import."""

import os
import signal
from itertools import count
from pathlib import Path

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation import folders, job
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


def stop_at(step, stop):
    """Calls `stop` at a step of writing: before a half-written file is renamed, after it, or in a manifest."""
    steps, replace, append = count(), os.replace, folders._append

    def stopping_replace(source, target):
        if next(steps) == step:
            Path(source).write_bytes(Path(source).read_bytes()[:100])
            stop()
        replace(source, target)
        if next(steps) == step:
            stop()

    def stopping_append(folder, entries):
        append(folder, entries[:-1])
        if next(steps) == step:
            with (folder / "manifest-0.jsonl").open("a") as file:
                file.write('\n{"id": "test-9", "te')
            stop()
        append(folder, entries[-1:])

    return stopping_replace, stopping_append


def kill_at(step, config, folder):
    """Samples a folder and kills this process at a step of writing."""
    os.replace, folders._append = stop_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    job.sample(config, folder)
