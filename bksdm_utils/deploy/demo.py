"""A page in the browser where teacher and student generate side by side (notebook 06 and the command `demo`).

It listens on this machine only, serves one request after another, and needs no network.
"""

from __future__ import annotations

import asyncio
import html
import os
import threading
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

from PIL import Image

from ..config.deploy import Demo
from ..config.presets import STORYBOOK
from ..data.rendering import render
from ..data.scenes import sample_scene
from ..files import ROOT
from ..models.pipelines import Pipeline, load_pipeline, load_unet, sampling_dtype, with_unet
from .playground import Request, check, cost, cut_off, evaluations, generate_request, open_upload, own_size

STUDENT = "outputs/03_kd_training/storybook-bk_small/unet_ema"
DEFAULTS = Demo()
CSS = """
.images img { image-rendering: pixelated; }
.images .grid-wrap { height: auto !important; max-height: none !important; overflow: visible !important; }
.status { min-height: 3.5em; }
.status progress { width: 100%; accent-color: var(--color-accent); }
footer { display: none !important; }
"""


class Stopped(Exception):
    """The request was cancelled, or its visitor left."""


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
    page = app(models, config)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
    page.launch(
        server_name=config.host, server_port=config.port, share=config.share, prevent_thread_lock=not wait,
        show_error=True, css=CSS, theme=_gradio().themes.Soft(**fonts), max_file_size="20mb", footer_links=[],
        run_history=False, ssr_mode=False, enable_monitoring=False,
    )  # fmt: skip
    return page


def app(models: Mapping[str, Pipeline], config: Demo = DEFAULTS):
    """The page, a gradio.Blocks: tabs for text to image and image to image, a gallery for each model."""
    gradio, first = _gradio(), next(iter(models.values()))
    limits = config.but(max_size=config.max_size or 2 * own_size(first))
    executor = ThreadPoolExecutor(1)  # a cancelled request and the next one never run at once
    # Images are in Gradio's cache folder, from which the browser fetches them, for an hour.
    with gradio.Blocks(title="BK-SDM", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown("## BK-SDM: " + " beside ".join(models))
        for name in ("Text to image", "Image to image"):
            with gradio.Tab(name), gradio.Row():
                with gradio.Column(scale=2, min_width=280):
                    inputs = _controls(gradio, first, limits, from_image=name.startswith("Image"))
                    with gradio.Row():
                        button, stop = gradio.Button("Generate", variant="primary"), gradio.Button("Stop")
                with gradio.Column(scale=3, min_width=280):
                    status, outputs = gradio.HTML(elem_classes="status"), _galleries(gradio, models)
            started = gradio.on(
                [button.click, inputs["prompt"].submit], _handler(gradio, models, limits, executor, status, outputs),
                inputs_kwargs=inputs, outputs=[status, *(part for pair in outputs.values() for part in pair)],
                api_name=name.lower().replace(" ", "_"), concurrency_id="generate", concurrency_limit=1,
                show_progress_on=status,
            )  # fmt: skip
            stop.click(lambda: "Stopped.", None, status, cancels=[started], queue=False, api_visibility="private")
    return blocks.queue(max_size=limits.max_waiting, default_concurrency_limit=1)


def _controls(gradio, pipeline: Pipeline, limits: Demo, from_image: bool) -> dict:
    """The controls of one tab by the fields of `Request`, whose errors name the value, as Gradio's do not."""
    scene, side, preset = sample_scene(3), own_size(pipeline), STORYBOOK.common
    guidance = preset["guidance_scale"] if side == preset["resolution"] else 7.5
    controls = {
        # The scene's image is the default to start from; the prompt changes the first object's colour.
        "prompt": gradio.Textbox(scene.alternatives("colour")[0].caption, label="Prompt", lines=2, max_lines=4),
        "negative_prompt": gradio.Textbox(label="Negative prompt: what the images should not show"),
    }
    if from_image:
        controls["image"] = gradio.Image(render(scene, 3), label="Image to start from", height=220,
                                         sources=["upload", "clipboard"], format="png")  # fmt: skip
        _uploads_only(gradio, controls["image"])
        controls["strength"] = gradio.Slider(0, 1, 0.6, step=0.05, label="Strength: how much is replaced")
    with gradio.Row():
        controls["steps"] = gradio.Slider(4, limits.max_steps, min(25, limits.max_steps), step=1, label="Steps")
        controls["guidance"] = gradio.Slider(0, 30, guidance, step=0.5, label="Guidance")
    with gradio.Row():
        for name, value, low, high, step in (("seed", 0, 0, 2**63 - 1, 1), ("images", 1, 1, limits.max_images, 1),
                                             ("size", side, 8, limits.max_size, 8)):  # fmt: skip
            controls[name] = gradio.Number(value, label=name.capitalize(), minimum=low, maximum=high, precision=0,
                                           step=step, min_width=80)  # fmt: skip
    for control in controls.values():
        control.preprocess = lambda value: value
    return controls


def _uploads_only(gradio, control) -> None:
    """Gradio fetches an image whose address a program sends; this page does not."""
    take = control.async_move_resource_to_block_cache

    async def take_file(path: str) -> str:
        if path.lower().startswith(("http:", "https:")):
            raise gradio.Error("the image is an address: expected a file", print_exception=False)
        return await take(path)

    control.async_move_resource_to_block_cache = take_file


def _galleries(gradio, models: Mapping[str, Pipeline]) -> dict:
    """A gallery and a line below it for each model."""
    outputs = {}
    with gradio.Row():
        for name in models:
            with gradio.Column(min_width=240):
                gallery = gradio.Gallery(label=name, columns=2, object_fit="contain", elem_classes="images",
                                         interactive=False, buttons=["download"])  # fmt: skip
                outputs[name] = gallery, gradio.Markdown()
    return outputs


def _handler(gradio, models: Mapping[str, Pipeline], limits: Demo, executor: Executor, status, outputs: Mapping):
    """The function of the button: an asynchronous generator of updates of the page."""

    async def handle(**values):
        try:
            request = await asyncio.to_thread(_request, values, limits)  # decodes an image
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        shown = {part: None for pair in outputs.values() for part in pair}
        async with aclosing(progress(models, request, executor)) as events:
            async for name, (first, second) in events:
                if isinstance(first, int):
                    bar = f'step {first} of {second}<progress value="{first}" max="{second}"></progress>'
                    yield {status: f"{html.escape(name)}: {bar}", **shown}
                    continue
                line = await asyncio.to_thread(cost, models[name], request, second)
                gallery, below = outputs[name]
                shown |= {gallery: _save(first, Path(gallery.GRADIO_CACHE)), below: line}
                yield dict(shown)
        yield {status: _remarks(next(iter(models.values())), request), **shown}

    return handle


async def progress(models: Mapping[str, Pipeline], request: Request, executor: Executor) -> AsyncIterator[tuple]:
    """Samples with one model after another in the executor; if it is closed early, sampling ends with the next step.

    Yields:
        (name, (steps done, steps in all)) several times a second, then (name, result of `generate_request`).
    """
    for name, pipeline in models.items():
        stop, state = threading.Event(), [(0, evaluations(pipeline, request))]

        def step(*reached: int, stop=stop, state=state) -> None:
            state[0] = reached
            if stop.is_set():
                raise Stopped

        task = asyncio.get_running_loop().run_in_executor(executor, generate_request, pipeline, request, step)
        try:
            while not task.done():
                yield name, state[0]
                await asyncio.wait([task], timeout=0.2)
            yield name, task.result()
        finally:
            stop.set()
            task.cancel()  # for one that has not begun


def _save(images: Sequence[Image.Image], cache: Path) -> list[str]:
    """Saves images in a new folder of Gradio's cache.

    Gradio itself names files by content, and rewrites them while another visitor fetches the same.
    """
    (folder := cache / uuid.uuid4().hex).mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(len(images))]


def _request(values: Mapping[str, object], limits: Demo) -> Request:
    """A checked request from the values of the controls."""
    if "image" in values:
        if values["image"] is None:
            raise ValueError("there is no image to start from: add one, or use the tab Text to image")
        values = {**values, "image": open_upload(values["image"].path or "")}
    request = Request(**values)
    check(request, limits)
    return request


def _remarks(pipeline: Pipeline, request: Request) -> str:
    """Says which prompts exceed the text encoder's maximum length."""
    remarks, tokens = [], pipeline.tokenizer.model_max_length - 2
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        if end := cut_off(pipeline, text):
            shown = html.escape(end[:80]) + " …" * (len(end) > 80)
            remarks.append(f"The text encoder reads {tokens} tokens. The end of the {name} was cut off: <i>{shown}</i>")
    return "<br>".join(remarks)


def _gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the page needs Gradio, which is not installed: pip install -e '.[demo]'") from error
    return gradio
