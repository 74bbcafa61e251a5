"""Parameters of notebook 06 and of the demo."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .base import Config, Device, NonNegative, PathText, Positive, Share, parameter
from .shared import PresetSampling, Teacher
from .training import Count, TrainingData


class DemoAndExport(PresetSampling, TrainingData, Teacher):
    """Notebook 06: playground, few-step students, exports."""

    notebook: ClassVar[str] = "06_demo_and_export"
    student: PathText | None = parameter(
        None, "U-Net folder or hub id; None: notebook 03's of this variant", heading="demo and export"
    )
    lora: PathText | None = parameter(None, "LoRA on top of the student, such as notebook 05's; it is merged")
    prompt: str = parameter("a big red boat on the sea", "what is sampled first")
    negative_prompt: str = parameter("", "what the images should not show")
    image: PathText | None = parameter(None, "file of an image to start from; None is a sketch drawn here")
    strength: Share = parameter(0.6, "how much of that image is replaced, 0 to 1")
    num_images: Positive = parameter(64, "test captions for the scores by number of steps")
    few_steps: tuple[Positive, ...] = parameter((1, 2, 4, 8), "numbers of steps that are compared")
    lcm_steps: Count = parameter(80, "optimizer steps of the few-step student; 0 leaves it out")
    lcm_intervals: Positive = parameter(10, "solver steps from noise to image; LCM's own 50 need many more steps")
    batch_size: Positive | None = parameter(None, "images in a step of the few-step student")
    learning_rate: NonNegative = parameter(5e-4, "of the few-step student")
    clip: PathText | None = parameter(None, "CLIP folder or hub id of the scores")
    formats: tuple[Literal["diffusers", "single_file", "onnx", "core_ml"], ...] = parameter(
        ("diffusers", "single_file", "onnx"), "diffusers, single_file, onnx, core_ml; empty exports nothing"
    )
    licence: str | None = parameter(None, "of the weights, for the model card; None: the teacher's")
    repo_id: str | None = parameter(None, "name on the Hugging Face hub, for the list of what would be uploaded")
    push_to_hub: bool = parameter(False, "upload it; a new repository is private")
    gradio: bool = parameter(False, "open the demo page inside this notebook")


class Demo(Config):
    """The command `demo`: a page on this machine, and the most that one request may ask for."""

    teacher: PathText = parameter("data/storybook/teacher", "pipeline's folder or hub id")
    students: tuple[str, ...] | None = parameter(None, "U-Net folders or hub ids; None: notebook 03's for storybook")
    device: Device = parameter("auto", "auto, cuda, mps or cpu")
    host: str = parameter("127.0.0.1", "address to listen on; 127.0.0.1 is this machine only")
    port: Annotated[int, Field(ge=1, le=65535)] | None = parameter(None, "None: the first free one from 7860")
    share: bool = parameter(False, "ask Gradio's servers for a public link")
    max_prompt: Positive = parameter(1000, "most characters of a prompt")
    max_steps: Annotated[int, Field(ge=4)] = parameter(50, "most denoising steps")
    max_size: Annotated[int, Field(ge=8)] | None = parameter(None, "most pixels a side; None: twice the teacher's own")
    max_images: Positive = parameter(4, "most images of one request")
    max_megapixels: NonNegative = parameter(25.0, "largest image to start from")
    max_waiting: Positive = parameter(20, "most requests in the queue")
