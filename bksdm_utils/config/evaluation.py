"""Parameters of sampling and of notebooks 04 and 07."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from .base import PathText, Positive, Processes, Seed, parameter
from .shared import Common, Sampling, Teacher
from .training import Side


class FolderSampling(Sampling):
    """How a folder of images is sampled; `seed` and each image's id give its noise."""

    seed: Seed = parameter(0, "of the noise, together with each image's id")
    size: Side | None = parameter(None, "pixels a side; None is what the U-Net was trained for")
    image_format: Literal["png", "jpeg"] = parameter("png", "png, or jpeg of quality 75 as in the paper")
    batch_size: Positive = parameter(16, "images in one pass on a GPU; on a CPU passes have a fixed size")
    noise: Literal["by_id", "running"] = parameter(
        "by_id", "by_id: images are the same in any batch; running: one generator for all, as BK-SDM evaluated"
    )


class SampleFolder(FolderSampling, Common):
    """The command `sample`: a folder of images."""

    teacher: PathText = parameter("data/storybook/teacher", "pipeline's folder or hub id")
    unet: PathText | None = parameter(None, "U-Net folder or hub id in place of the pipeline's")
    lora: PathText | None = parameter(None, "LoRA on top of it")
    prompts: PathText | None = parameter(None, "CSV file with a column text; None: storybook's test captions")
    prompt: str | None = parameter(None, "one prompt instead, sampled `num_images` times")
    num_images: Positive | None = parameter(None, "the first so many prompts; None: all of a file, 100 of storybook's")
    subject: str | None = parameter(None, "notebook 05's prompts of this subject instead, each `num_images` times")
    identifier: str | None = parameter(None, "the word the subject was trained with; None: notebook 05's")
    class_word: str | None = parameter(None, "what a folder of your own shows, such as dog")
    num_processes: Positive | None = parameter(None, "None samples in this process; a number in so many")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = {name: getattr(self, name) for name in ("prompt", "prompts", "subject")}
        if len(given := [name for name, value in sources.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} are given: expected one of them")
        if (self.identifier or self.class_word) and self.subject is None:
            raise ValueError("identifier and class_word are about a subject: name it by subject")
        return self


class CocoEvaluation(
    FolderSampling.preset_decides("num_inference_steps", "guidance_scale", "image_format", "batch_size"), Teacher
):
    """Notebook 04: scores of teacher and students by a named protocol."""

    notebook: ClassVar[str] = "04_coco_evaluation"
    students: tuple[str, ...] = parameter(
        (), "U-Net folders or hub ids, commas between; none: notebook 03's", heading="evaluation"
    )
    with_teacher: bool = parameter(True, "also sample the teacher; no scores the students alone")
    untrained: bool | None = parameter(None, "also sample students with copied and with random weights")
    protocol: Literal["storybook", "paper", "clean"] | None = parameter(None, "storybook, paper or clean")
    prompts: PathText | None = parameter(None, "CSV file with a column text, and id or file_name")
    real: PathText | None = parameter(None, "real images: statistics (.npz), folder or .zip; None: the protocol's")
    clip: PathText | None = parameter(None, "CLIP folder or hub id; None: the protocol's")
    num_images: Positive | None = parameter(None, "captions sampled by each model")
    guidances: tuple[float, ...] = parameter((1.0, 2.0, 4.0, 8.0), "guidance scales compared; empty leaves it out")
    num_guidance_images: Positive = parameter(40, "images for each guidance scale")
    num_processes: Processes = parameter(None, "None samples in this kernel; a number in processes that outlive it")
    images_dir: PathText | None = parameter(None, "folder of the images; None: outputs/cache/images")
    resume: bool = parameter(True, "keep the images that exist; no samples those of these captions anew")


class Results(Common):
    """Notebook 07: all runs in one table."""

    notebook: ClassVar[str] = "07_results"
    runs_dir: PathText | None = parameter(None, "folder with the runs; None: outputs")
    readme: PathText | None = parameter(None, "Markdown file whose table between the marks students is written anew")
