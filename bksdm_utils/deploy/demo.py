"""A page in the browser where teacher and student generate side by side (notebook 06 and the command `demo`).

It listens on this machine only, serves one request after another, and needs no network.
"""

from __future__ import annotations

import asyncio
import html
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..config.deploy import Demo
from ..config.presets import STORYBOOK
from ..data.rendering import render
from ..data.scenes import sample_scene
from ..files import ROOT
from ..models.pipelines import Pipeline, load_pipeline, load_unet, sampling_dtype, with_unet
from .formats import require
from .playground import DEFAULTS, Request, generate_request, open_upload, own_size

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

STUDENT = "outputs/03_kd_training/storybook-bk_small/unet_ema"
CSS = """
.images img { image-rendering: pixelated; }
.images .grid-wrap { height: auto !important; max-height: none !important; overflow: visible !important; }
.status { min-height: 3.5em; }
.status progress { width: 100%; accent-color: var(--color-accent); }
footer { display: none !important; }
"""


def serve(config: Demo) -> None:
    """Loads teacher and students and serves the page until it is interrupted.

    Raises:
        ValueError: a model could not be loaded, or Gradio is not installed.
        OSError: the port is taken.
    """
    default = (STUDENT,) if config.teacher == STORYBOOK.teacher and (ROOT / STUDENT).is_dir() else ()
    students = default if config.students is None else config.students
    launch(load_models(config.teacher, students, config.device), config)


def load_models(teacher: str, students: Sequence[str], device: str = "cpu") -> dict[str, Pipeline]:
    """The teacher's pipeline and one with each student's U-Net, by name."""
    pipeline = load_pipeline(teacher, device, sampling_dtype(device))
    models = {"teacher": pipeline}
    for student in students:
        path = Path(student)
        name = path.parent.name if path.name in ("unet", "unet_ema") else path.name
        models[student if name in models else name] = with_unet(pipeline, load_unet(student, pipeline))
    return models


def launch(models: Mapping[str, Pipeline], config: Demo = DEFAULTS, wait: bool = True):
    """Serves the page and returns the gradio.Blocks, with `wait` once it is interrupted. Raises as `serve`."""
    page, (gradio,) = app(models, config), require("demo", "gradio")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
    page.launch(
        server_name=config.host, server_port=config.port, share=config.share, prevent_thread_lock=not wait,
        show_error=True, css=CSS, theme=gradio.themes.Soft(**fonts), max_file_size="20mb", footer_links=[],
        run_history=False, ssr_mode=False, enable_monitoring=False,
    )  # fmt: skip
    return page


def app(models: Mapping[str, Pipeline], config: Demo = DEFAULTS):
    """The page, a gradio.Blocks: tabs for text to image and image to image, a gallery for each model."""
    (gradio,), first = require("demo", "gradio"), next(iter(models.values()))
    limits = config.but(max_size=config.max_size or 2 * own_size(first))
    executor = ThreadPoolExecutor(1)  # a cancelled request and the next one never run at once
    # Images are in Gradio's cache folder, from which the browser fetches them, for an hour.
    with gradio.Blocks(title="BK-SDM", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown("## BK-SDM: " + " beside ".join(models))
        if config.teacher != DEFAULTS.teacher:
            gradio.Markdown("There is no safety checker: nothing that these models generate is filtered.")
        for name in ("Text to image", "Image to image"):
            with gradio.Tab(name), gradio.Row():
                with gradio.Column(scale=2, min_width=280):
                    inputs = _controls(gradio, first, limits, from_image=name.startswith("Image"))
                    with gradio.Row():
                        button, stop = gradio.Button("Generate", variant="primary"), gradio.Button("Stop")
                with gradio.Column(scale=3, min_width=280):
                    status = gradio.HTML(elem_classes="status")
                    with gradio.Row():
                        galleries = {model: gradio.Gallery(label=model, columns=2, min_width=240, object_fit="contain",
                                                           elem_classes="images", interactive=False,
                                                           buttons=["download"]) for model in models}  # fmt: skip
            started = gradio.on(
                [button.click, inputs["prompt"].submit], _handler(gradio, models, limits, executor, status, galleries),
                inputs_kwargs=inputs, outputs=[status, *galleries.values()], concurrency_id="generate",
                concurrency_limit=1, api_name=name.lower().replace(" ", "_"), show_progress_on=status,
            )  # fmt: skip
            stop.click(lambda: "Stopped.", None, status, cancels=[started], queue=False, api_visibility="private")
    return blocks.queue(max_size=limits.max_waiting, default_concurrency_limit=1)


def _controls(gradio, pipeline: Pipeline, limits: Demo, from_image: bool) -> dict:
    """The controls of one tab by the fields of `Request`."""
    scene, side, preset = sample_scene(3), own_size(pipeline), STORYBOOK.common
    guidance = preset["guidance_scale"] if side == preset["resolution"] else 7.5
    controls = {
        # The scene's image is the default to start from; the prompt changes the first object's colour.
        "prompt": gradio.Textbox(scene.alternatives("colour")[0].caption, label="Prompt", lines=2, max_lines=4),
        "negative_prompt": gradio.Textbox(label="Negative prompt: what the images should not show"),
    }
    if from_image:
        controls["image"] = gradio.Image(render(scene, 3), label="Image to start from", height=220, format="png",
                                         sources=["upload", "clipboard"], type="filepath", image_mode=None)  # fmt: skip
        controls["strength"] = gradio.Slider(0, 1, 0.6, step=0.05, label="Strength: how much is replaced")
    with gradio.Row():
        controls["steps"] = gradio.Slider(4, limits.max_steps, min(25, limits.max_steps), step=1, label="Steps")
        controls["guidance"] = gradio.Slider(0, 30, guidance, step=0.5, label="Guidance")
    with gradio.Row():
        for name, value, low, high, step in (("seed", 0, 0, 2**63 - 1, 1), ("images", 1, 1, limits.max_images, 1),
                                             ("size", side, 8, limits.max_size, 8)):  # fmt: skip
            controls[name] = gradio.Number(value, label=name.capitalize(), minimum=low, maximum=high, precision=0,
                                           step=step, min_width=80)  # fmt: skip
    return controls


def _handler(gradio, models: Mapping[str, Pipeline], limits: Demo, executor: Executor, status, galleries: Mapping):
    """The function of the button: an asynchronous generator of updates of the page, for one model after another."""

    async def handle(**values):
        try:
            request = await asyncio.to_thread(_request, values, limits)  # decodes an image
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        lines, shown = [], dict.fromkeys(galleries.values())
        for name, pipeline in models.items():
            stop, reached = threading.Event(), [(0, request.steps)]

            def step(*now: int, stop=stop, reached=reached) -> None:
                reached[0] = now
                if stop.is_set():
                    raise InterruptedError

            task = asyncio.get_running_loop().run_in_executor(executor, generate_request, pipeline, request, step)
            try:
                while not task.done():
                    done, total = reached[0]
                    bar = f'step {done} of {total}<progress value="{done}" max="{total}"></progress>'
                    yield {status: "<br>".join([*lines, f"{html.escape(name)}: {bar}"]), **shown}
                    await asyncio.wait([task], timeout=0.2)
            finally:  # stopped, or its visitor left: sampling ends with the next step
                stop.set()
                task.cancel()  # for one that has not begun
            images, cost = task.result()
            lines.append(f"{html.escape(name)}: {cost}")
            shown[galleries[name]] = _save(images, Path(galleries[name].GRADIO_CACHE))
        yield {status: "<br>".join([*lines, *_remarks(next(iter(models.values())), request)]), **shown}

    return handle


def _save(images: Sequence[Image.Image], cache: Path) -> list[str]:
    """Saves images in a new folder: Gradio itself names files by content, and rewrites them while others fetch them."""
    (folder := cache / uuid.uuid4().hex).mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(len(images))]


def _request(values: Mapping[str, object], limits: Demo) -> Request:
    """A request from the values of the controls, whose numbers Gradio has kept within their limits."""
    for name in ("prompt", "negative_prompt"):
        if len(values[name] or "") > limits.max_prompt:
            raise ValueError(f"{name} has {len(values[name]):,} characters: expected at most {limits.max_prompt:,}")
    if "image" in values:
        if values["image"] is None:
            raise ValueError("there is no image to start from: add one, or use the tab Text to image")
        values = {**values, "image": open_upload(values["image"], limits.max_megapixels)}
    return Request(**values)


def _remarks(pipeline: Pipeline, request: Request) -> list[str]:
    """Says what of the prompts is beyond the text encoder's maximum length."""
    remarks, tokenizer = [], pipeline.tokenizer
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        ids, most = tokenizer(text).input_ids, tokenizer.model_max_length
        if len(ids) > most:
            end = html.escape(tokenizer.decode(ids[most - 1 : -1])[:80])
            remarks.append(f"The text encoder reads {most - 2} tokens. The end of the {name} was cut off: <i>{end}</i>")
    return remarks
