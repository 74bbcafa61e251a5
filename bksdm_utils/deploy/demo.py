"""A page in the browser where teacher and student generate side by side: text to image and image to image.

It listens on this machine only, serves one visitor after another, and asks nothing of any network.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import os
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image

from ..config.presets import STORYBOOK
from ..data.rendering import render
from ..data.scenes import sample_scene
from ..files import ROOT
from ..models.pipelines import Pipeline, load_pipeline, load_unet, with_unet
from .playground import (
    FEWEST_STEPS,
    Limits,
    Request,
    Stopped,
    check,
    cut_off,
    evaluations,
    generate_request,
    macs,
    open_upload,
    own_size,
)

STUDENT = "outputs/03_kd_training/storybook-bk_small/unet_ema"


CSS = """
.drawn img { image-rendering: pixelated; }
.drawn .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.drawn .grid-wrap { overflow: visible !important; }
.news { min-height: 3.5em; }
.news progress { width: 100%; height: 0.6em; appearance: none; }
.news progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 1em; }
.news progress::-webkit-progress-value { background: var(--color-accent); border-radius: 1em; }
.news progress::-moz-progress-bar { background: var(--color-accent); }
footer { display: none !important; }
"""


async def answers(models: Mapping[str, Pipeline], request: Request, crew: Executor) -> AsyncIterator[tuple]:
    """Draws with one model after another in the crew's threads; closed early, the drawing ends with its next step.

    Yields:
        (name, (steps done, steps in all)) several times a second, and then (name, what `draw` returned).
    """
    for name, pipeline in models.items():
        stop, at = threading.Event(), (0, evaluations(pipeline, request))

        def step(*reached: int, stop=stop) -> None:
            nonlocal at
            at = reached
            if stop.is_set():
                raise Stopped

        drawing = asyncio.get_running_loop().run_in_executor(crew, generate_request, pipeline, request, step)
        try:
            while not drawing.done():
                yield name, at
                await asyncio.wait([drawing], timeout=0.2)
            yield name, drawing.result()
        finally:
            stop.set()
            drawing.cancel()  # nothing for one that is done; one that has not begun never will


def app(models: Mapping[str, Pipeline], limits: Limits | None = None):
    """The page, a gradio.Blocks: a tab for text to image and one for image to image, a gallery for each model.

    Args:
        models: pipelines by the names that stand over their pictures; the first one's settings are offered.
    """
    gradio, limits = _gradio(), (limits or Limits()).for_model(next(iter(models.values())))
    crew = ThreadPoolExecutor(1)  # a stopped drawing and the next one never run at once
    # What was drawn lies in Gradio's folder for the browser to fetch; after an hour it goes.
    with gradio.Blocks(title="BK-SDM", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown("## BK-SDM: " + " beside ".join(models))
        for name, starts in (("Text to image", False), ("Image to image", True)):
            with gradio.Tab(name), gradio.Row():
                with gradio.Column(scale=2, min_width=280):
                    inputs = _controls(gradio, next(iter(models.values())), limits, starts)
                    with gradio.Row():
                        button, stop = gradio.Button("Draw", variant="primary"), gradio.Button("Stop")
                with gradio.Column(scale=3, min_width=280):
                    news, outputs = gradio.HTML(elem_classes="news"), _galleries(gradio, models)
            # Both tabs wait in one queue: of "drawing" there is one at a time.
            begun = gradio.on(
                [button.click, inputs["prompt"].submit], _handler(gradio, models, limits, crew, news, outputs),
                inputs_kwargs=inputs, outputs=[news, *(part for pair in outputs.values() for part in pair)],
                api_name=name.lower().replace(" ", "_"), concurrency_id="drawing", concurrency_limit=1,
                show_progress_on=news,
            )  # fmt: skip
            stop.click(lambda: "Stopped.", None, news, cancels=[begun], queue=False, api_visibility="private")
    return blocks.queue(max_size=limits.waiting, default_concurrency_limit=1)


def _controls(gradio, pipeline: Pipeline, limits: Limits, starts: bool) -> dict:
    """The controls of one tab by the fields of `Request`; those of a picture to start from where it `starts` so."""
    scene = sample_scene(3)
    controls = {
        # Beside the scene's picture, the first thing's colour is what the prompt changes.
        "prompt": gradio.Textbox(scene.alternatives("colour")[0].caption, label="Prompt", lines=2, max_lines=4),
        "negative_prompt": gradio.Textbox(label="Negative prompt: what shall not be there"),
    }
    if starts:
        controls["picture"] = gradio.Image(render(scene, 3), label="Picture to start from", height=220,
                                           sources=["upload", "clipboard"], format="png")  # fmt: skip
        _uploads_only(gradio, controls["picture"])
        controls["strength"] = gradio.Slider(0, 1, 0.6, step=0.05, label="Strength: how much is drawn anew")
    with gradio.Row():
        controls["steps"] = gradio.Slider(FEWEST_STEPS, limits.steps, min(25, limits.steps), step=1, label="Steps")
        guidance = STORYBOOK.guidance_scale if own_size(pipeline) == STORYBOOK.resolution else 7.5
        controls["guidance"] = gradio.Slider(0, 30, guidance, step=0.5, label="Guidance")
    with gradio.Row():
        controls["seed"] = gradio.Number(0, label="Seed", min_width=80)
        controls["pictures"] = gradio.Number(1, label="Pictures", min_width=80)
        controls["size"] = gradio.Number(own_size(pipeline), label="Size (pixels)", step=8, min_width=80)
    for control in controls.values():
        control.preprocess = lambda sent: sent  # as the browser or program sent it: `check` alone judges
    return controls


def _uploads_only(gradio, control) -> None:
    """Gradio fetches a picture whose address a program sends; this page fetches nothing."""
    take = control.async_move_resource_to_block_cache

    async def take_file(path: str) -> str:
        if path.lower().startswith(("http:", "https:")):
            raise gradio.Error("the picture is an address: expected a file", print_exception=False)
        return await take(path)

    control.async_move_resource_to_block_cache = take_file


def _galleries(gradio, models: Mapping[str, Pipeline]) -> dict:
    """A gallery and a line below it for each model, by its name."""
    outputs = {}
    with gradio.Row():
        for name in models:
            with gradio.Column(min_width=240):
                gallery = gradio.Gallery(label=name, columns=2, object_fit="contain",
                                         elem_classes="drawn", interactive=False, buttons=["download"])  # fmt: skip
                outputs[name] = gallery, gradio.Markdown()
    return outputs


def _handler(gradio, models: Mapping[str, Pipeline], limits: Limits, crew: Executor, news, outputs: Mapping):
    """What happens when a request is sent: an asynchronous generator of what the page shows."""

    async def handle(**sent):
        try:
            request = await asyncio.to_thread(_request, sent, limits)  # decodes; others must not wait for it
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        shown = {part: None for pair in outputs.values() for part in pair}  # older pictures go
        async with aclosing(answers(models, request, crew)) as coming:
            async for name, told in coming:
                pictures, number = told
                if isinstance(pictures, int):
                    yield {news: f"{html.escape(name)}: {_bar(pictures, number)}", **shown}
                    continue
                work = await asyncio.to_thread(macs, models[name], request)
                line = f"{number:.1f} s, {work / 1e9:,.3g} G MACs"
                gallery, below = outputs[name]
                shown |= {gallery: _files(pictures, Path(gallery.GRADIO_CACHE)), below: line}
                yield dict(shown)
        yield {news: _remarks(next(iter(models.values())), request), **shown}

    return handle


def _files(pictures: Sequence[Image.Image], root: Path) -> list[str]:
    """Saves pictures in a folder of their own, where Gradio serves them, under a name that nobody can guess.

    Gradio itself names files by content, and writes them anew while another visitor fetches the very same.
    """
    folder = root / uuid.uuid4().hex
    folder.mkdir(parents=True)
    paths = [str(folder / f"{i}.png") for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return paths


def _request(sent: Mapping[str, object], limits: Limits) -> Request:
    """A checked request from what a browser or program sent; browsers know no whole numbers."""
    values = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in sent.items()}
    if "picture" in values:
        if values["picture"] is None:
            raise ValueError("there is no picture to start from: add one, or use the tab Text to image")
        values["picture"] = open_upload(values["picture"].path or "")
    request = Request(**values)
    check(request, limits)
    return request


def _bar(done: int, total: int) -> str:
    return f'step {done} of {total}<progress value="{done}" max="{total}"></progress>'


def _remarks(pipeline: Pipeline, request: Request) -> str:
    """What a visitor should know about the pictures."""
    remarks = []
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        if lost := cut_off(pipeline, text):
            room = pipeline.tokenizer.model_max_length - 2
            remarks.append(f"The text encoder reads {room} tokens. The end of the {name} was cut off: "
                           f"<i>{html.escape(lost[:80])}</i>{' …' if len(lost) > 80 else ''}")  # fmt: skip
    return "<br>".join(remarks)


def _gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ValueError("this page needs Gradio, which is not installed: pip install -e '.[demo]'") from error
    return gradio


def launch(
    models: Mapping[str, Pipeline], limits: Limits | None = None, *, host: str = "127.0.0.1", port: int | None = None,
    share: bool = False, wait: bool = True,
):  # fmt: skip
    """Serves the page and returns the gradio.Blocks; with `wait` only once it is interrupted.

    Args:
        host: an address of this machine; 0.0.0.0 lets everybody in who reaches it.
        port: None takes the first free one from 7860.
        share: ask Gradio's servers for a public link.

    Raises:
        ValueError: Gradio is not installed.
        OSError: the port is taken.
    """
    page = app(models, limits)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
    page.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=not wait, show_error=True, css=CSS,
        theme=_gradio().themes.Soft(**fonts), max_file_size="20mb", footer_links=[], run_history=False, ssr_mode=False,
        enable_monitoring=False,
    )  # fmt: skip
    return page


def load_models(teacher: str, students: Sequence[str]) -> dict[str, Pipeline]:
    """The teacher's pipeline and one around each student's U-Net, by name; on a GPU in half precision.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(teacher, device, torch.float16 if device == "cuda" else torch.float32)
    models = {"teacher": pipeline}
    for place in students:
        path = Path(place)
        name = path.parent.name if path.name in ("unet", "unet_ema") else path.name
        models[str(place) if name in models else name] = with_unet(pipeline, load_unet(place, pipeline))
    return models


def main(arguments: Sequence[str] | None = None) -> int:
    """Loads the models and serves the page until it is interrupted; 1 where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m bksdm_utils.deploy.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--teacher", default=STORYBOOK.teacher, help="diffusers folder or hub id")
    parser.add_argument("--student", action="append", help=f"a U-Net's folder, repeatable; default {STUDENT}")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: nobody but this machine")
    parser.add_argument("--port", type=int)
    parser.add_argument("--share", action="store_true", help="ask Gradio's servers for a public link")
    for field in fields(Limits):
        default = "twice the teacher's own" if field.default is None else field.default
        kind = float if isinstance(field.default, float) else int
        parser.add_argument(f"--{field.name}", type=kind, help=f"the most; default {default}")
    chosen = parser.parse_args(arguments)
    by_default = [STUDENT] if chosen.teacher == STORYBOOK.teacher and (ROOT / STUDENT).is_dir() else []
    given = {field.name: getattr(chosen, field.name) for field in fields(Limits)}
    try:
        limits = Limits(**{name: value for name, value in given.items() if value is not None})
        models = load_models(chosen.teacher, by_default if chosen.student is None else chosen.student)
        launch(models, limits, host=chosen.host, port=chosen.port, share=chosen.share)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
