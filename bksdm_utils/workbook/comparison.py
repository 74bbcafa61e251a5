"""Teacher, trained and untrained students on the same captions and noise: what notebook 04 compares."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ..config.evaluation import FolderSampling, SampleFolder
from ..core.surgery import build_student
from ..costs.counting import count
from ..costs.measuring import interleaved_latency
from ..evaluation import folders as image_folders
from ..evaluation.evaluator import FEWEST, Evaluation, Evaluator, by_short_name, distance_to
from ..evaluation.metrics import Score
from ..evaluation.prompts import Prompt
from ..evaluation.sampling import image_seed
from ..files import resolve
from ..models.hashes import model_hash
from ..models.pipelines import find_pipeline, load_unet, sampling_dtype, with_unet
from .live import Gallery
from .run import Run, folder_name, student_folder

UNTRAINED = {"copied": True, "random": False}  # students by whether they have the teacher's weights
Table = dict[str, dict[str, Score]]  # model -> score -> value and error


class Comparison:
    """Trained students, and where they are wanted the teacher and two untrained ones, on the same prompts and noise.

    Attributes:
        models: U-Nets by name, the teacher first if it is sampled; empty where weights or prompts are not available.
        paths: where the U-Nets of trained students were loaded from.
        students: the names of the trained students.
        folders: folders of images by model, once `sample` has filled them.
        sampled: how many of them each model sampled in this run, and in how many seconds.
    """

    def __init__(self, run: Run):
        self.run, self.config, self.folders, self.sampled = run, run.config, {}, {}
        self.prompts = run.if_available(image_folders.read_job_prompts, self.config.part(SampleFolder)) or []
        dtype = sampling_dtype(run.device)
        self.pipeline = find_pipeline(self.config.teacher, run.device, dtype) if self.prompts else None
        self.models = {"teacher": self.pipeline.unet} if self.pipeline and self.config.with_teacher else {}
        self.paths = _students(run) if self.pipeline else {}
        self.models |= {name: load_unet(path, self.pipeline) for name, path in self.paths.items()}
        self.students = list(self.paths)
        if self.pipeline and self.config.untrained:
            for name, copy in UNTRAINED.items():
                self.models[name] = build_student(self.pipeline.unet, run.plan, copy=copy).eval()

    def first_captions(self, number: int = 4) -> pd.DataFrame:
        """Ids, captions and the seeds of their noise."""
        rows = [(p.id, p.text, image_seed(self.run.seed, p.id)) for p in self.prompts[:number]]
        return pd.DataFrame(rows, columns=["id", "caption", "seed"])

    def check_numbers(self) -> None:
        """Raises ValueError where there would be too few images to score."""
        quick = self.config.num_guidance_images if self.config.guidances and self.students else FEWEST
        for name, number in (("num_images", len(self.prompts)), ("num_guidance_images", quick)):
            if self.models and number < FEWEST:
                raise ValueError(f"{name} is {number}: scores need {FEWEST} images at least")

    def sample(self) -> dict[str, Path]:
        """Fills a folder of images for each model; what is complete is kept. Returns the folders."""
        sampling, gallery = self.config.part(FolderSampling), Gallery(len(self.models))
        for name, unet in self.models.items():
            model = with_unet(self.pipeline, unet)
            key, label = model_hash(model), self._label(name)
            folder = self.folders[name] = image_folders.folder_of(self.config.images_dir, label, key, sampling)
            if not self.config.resume:
                image_folders.delete_images(folder, self.prompts)
            several = self._in_processes(name, folder) if self.config.num_processes else None
            started, first = time.perf_counter(), None
            for progress in several or image_folders.sample_folder(model, self.prompts, folder, sampling, key):
                first = progress.done if first is None else first
                gallery.update(name, progress)
            self.sampled[name] = {"images": progress.done - first, "seconds": time.perf_counter() - started}
            if progress.done == first:
                print(f"{name}: every image was there" + ", which no batch_size changes" * (sampling.noise == "by_id"))
        return self.folders

    def _label(self, name: str) -> str:
        variant = None if name == "teacher" else self.run.variant  # one teacher serves all variants
        return folder_name(folder_name(self.config.preset, variant), name)

    def _in_processes(self, name: str, folder: Path):
        path = self.paths.get(name)
        if path is None and name != "teacher":  # untrained students have no folder yet
            path = str(self.run.dir / name)
            self.models[name].save_pretrained(path)
        job = self.config.part(SampleFolder, unet=path, lora=None, output_dir=None)
        return image_folders.sample_in_processes(job, self.prompts, folder, self.config.num_processes)

    def opened(self, name: str, prompts: Sequence[Prompt]) -> list[Image.Image]:
        """One model's images of these prompts."""
        return [Image.open(image_folders.image_path(self.folders[name], prompt.id)) for prompt in prompts]

    def prompts_of(self, ids: Sequence[str]) -> list[Prompt]:
        """Prompts by their ids."""
        by_id = {prompt.id: prompt for prompt in self.prompts}
        return [by_id[id] for id in ids]

    def scores(self, evaluations: Mapping[str, Evaluation]) -> Table:
        """Every model's scores, and how far its images are from the teacher's, where that is sampled."""
        table = {name: dict(evaluation.scores) for name, evaluation in evaluations.items()}
        for name, row in table.items():
            if name != "teacher" and "teacher" in self.folders:
                row["distance to teacher"] = distance_to(self.folders["teacher"], self.folders[name], self.prompts)
            for id, reason in evaluations[name].skipped[:5]:
                print(f"{name}: set aside {id}: {reason}")
        return table

    def protocol_line(self, evaluations: Mapping[str, Evaluation]) -> str:
        """Protocol, numbers of images, and what they allow to be said."""
        numbers = ", ".join(f"{e.num_images:,} of {name}" for name, e in evaluations.items())
        return f"protocol {self.config.protocol}; images: {numbers}. {next(iter(evaluations.values())).warning}"

    def fid_by_number(self, evaluator: Evaluator) -> dict[str, dict[int, Score]]:
        """FID of random subsets of a quarter, a half … of the images, by model."""
        quarters = {len(self.prompts) * number // 4 for number in (1, 2, 3, 4)}
        counts = sorted(n for n in quarters if n >= FEWEST)
        return {name: evaluator.fid_by_number(self.folders[name], self.prompts, counts)
                for name in self.models if name not in UNTRAINED}  # fmt: skip

    def by_guidance(self, evaluator: Evaluator) -> dict[float, dict[str, Score]]:
        """Scores of the first trained student at each guidance scale, of few images in few steps."""
        prompts, label = self.prompts[: self.config.num_guidance_images], self._label("guidance")
        model = with_unet(self.pipeline, self.models[self.students[0]])
        key, found, gallery = model_hash(model), {}, Gallery(len(self.config.guidances))
        for scale in self.config.guidances:
            # Ten steps of DPM-Solver++ are as good here as 25 of PNDM.
            sampling = self.config.part(FolderSampling, guidance_scale=scale, num_inference_steps=10, scheduler="dpm++")
            folder = image_folders.folder_of(self.config.images_dir, label, key, sampling)
            for progress in image_folders.sample_folder(model, prompts, folder, sampling, key):
                gallery.update(f"guidance {scale:g}", progress)
            found[scale] = evaluator.evaluate(folder, prompts).scores
        return found

    def write_csv(self, path: Path, table: Table, evaluations: Mapping[str, Evaluation]) -> None:
        """Every score with its error, protocol, number of images and the hash of what it was computed on."""
        rows = [{"model": name, "score": score, "value": s.value, "error": s.error, "protocol": e.protocol,
                 "images": e.num_images, "key": e.key}
                for name, e in evaluations.items() for score, s in table[name].items()]  # fmt: skip
        pd.DataFrame(rows).to_csv(path, index=False)

    def metrics(self, table: Table, evaluations: Mapping, by_number: Mapping, by_guidance: Mapping) -> dict:
        """What result.json keeps."""
        latency = interleaved_latency(self.models, repeats=5) if self.models else {}
        unets = {name: {"params": sum(p.numel() for p in unet.parameters()), "macs": count(unet).macs,
                        "latency": latency[name].median} for name, unet in self.models.items()}  # fmt: skip
        images = {name: {"key": e.key, "scored": e.num_images, "skipped": len(e.skipped),
                         "folder": self.folders[name].name} for name, e in evaluations.items()}  # fmt: skip
        return {
            "protocol": self.config.protocol, "num_images": len(self.prompts) if evaluations else 0,
            "scores": _plain(table), "images": images,
            "prompts_set_aside": [*getattr(self.prompts, "set_aside", ())],
            "students": {name: resolve(path) for name, path in self.paths.items()}, "unets": unets,
            "sampled": self.sampled, "batch_size": self.config.batch_size,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.run.device == "cuda" else None,
            "steps": self.config.num_inference_steps, "guidance": self.config.guidance_scale,
            "fid_by_number": _plain(by_number), "by_guidance": _plain(by_guidance),
        }  # fmt: skip


def _plain(table: Mapping) -> dict:
    return {row: {column: list(score) for column, score in scores.items()} for row, scores in table.items()}


def _students(run: Run) -> dict[str, str]:
    """The trained students' U-Nets by name: those that were named, or notebook 03's of this variant."""
    if run.config.students:
        return by_short_name(run.config.students)
    folder = student_folder(run.config)
    if folder.is_dir():
        return {run.variant: str(folder)}
    print(f"no student in {folder.parent.name}: run notebook 03 first, or name one by `students`")
    return {}
