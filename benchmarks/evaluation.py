"""How fast images are sampled and features computed: ours, a plain diffusers loop and the original's way, in turns.

    python benchmarks/evaluation.py                                                       # storybook, minutes on a CPU
    python benchmarks/evaluation.py --preset sd-v1.4 --variant bk_base --images 64 --batch-sizes 1,8,32   # for a GPU

Plain sampling is a diffusers pipeline called once for each batch, as BK-SDM's generate.py of 2023 does with a batch of
one. The original's scores process one image at a time. What counts is the ratio of medians in one run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torchvision
from kd import FOLDER, random_teacher
from PIL import Image

from bksdm_utils.config.evaluation import CocoEvaluation, FolderSampling
from bksdm_utils.core.surgery import build_student
from bksdm_utils.costs.counting import count
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation.features import compute
from bksdm_utils.evaluation.folders import sample_folder
from bksdm_utils.evaluation.networks import FAST, MetricClip, Network
from bksdm_utils.evaluation.prompts import Prompt
from bksdm_utils.files import write_json
from bksdm_utils.models.pipelines import load_pipeline, with_unet
from bksdm_utils.workbook.headless import print_table
from bksdm_utils.workbook.run import provenance


def turns(candidates: Mapping[str, Callable[[], object]], count: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each candidate in every round; a first, uncounted round warms all up."""
    rates = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                rates[name].append(count / (time.perf_counter() - started))
                print(f"round {turn} {name}: {rates[name][-1]:.2f} images/s", flush=True)
    return rates


def samplers(chosen: argparse.Namespace, device: str) -> tuple[dict[str, Callable], float]:
    """Plain loops of several batch sizes, and ours; and the 10^12 operations that one image costs."""
    config = CocoEvaluation.filled(preset=chosen.preset)
    path = config.teacher
    if chosen.preset != "storybook":
        path = random_teacher(config, FOLDER / f"teacher-{config.preset}")
    pipe = load_pipeline(path, device, torch.float16 if device == "cuda" else torch.float32)
    unet = build_student(pipe.unet, chosen.variant).eval() if chosen.variant != "teacher" else pipe.unet
    pipe = with_unet(pipe, unet)
    captions = [sample_scene(i, "test").caption for i in range(chosen.images)]
    sampling = FolderSampling(num_inference_steps=chosen.steps, guidance_scale=config.guidance_scale,
                              batch_size=max(chosen.batch_sizes))  # fmt: skip

    def plain(batch_size: int) -> None:
        generator = torch.Generator(device).manual_seed(1234)
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, len(captions), batch_size):
                images = pipe(captions[start : start + batch_size], num_inference_steps=chosen.steps,
                              guidance_scale=config.guidance_scale, generator=generator).images  # fmt: skip
                for i, image in enumerate(images):
                    image.save(Path(folder) / f"{start + i}.png")

    def ours() -> None:
        prompts = [Prompt(str(i), text) for i, text in enumerate(captions)]
        with tempfile.TemporaryDirectory() as folder:
            for _ in sample_folder(pipe, prompts, Path(folder), sampling, model="benchmark"):
                pass

    passes = 2 * (chosen.steps + 1)  # with and without caption; PNDM's first step is two
    tera = 2 * passes * count(unet).macs_with_attention / 1e12
    return {**{f"plain, batch {b}": lambda b=b: plain(b) for b in chosen.batch_sizes}, "ours": ours}, tera


def networks(images: list[Image.Image], device: str) -> dict[str, dict[str, Callable]]:
    """For each metric network, one image after the other and ours."""
    clip = MetricClip("data/storybook/clip", device)
    inception = (
        torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).to(device).eval()
    )
    to_tensor = torchvision.transforms.Compose([torchvision.transforms.Resize((299, 299)),
                                                torchvision.transforms.ToTensor()])  # fmt: skip
    random = Network("inception", "random", 1008, to_tensor, lambda x: inception(x.to(device)))
    compared = {"CLIP": clip.image_network, "Inception": random}

    @torch.no_grad()
    def one_by_one(network: Network) -> None:
        inception.to(memory_format=torch.contiguous_format)  # as it comes
        for image in images:
            network.forward(network.prepare(image)[None]).cpu()

    def ours(network: Network) -> None:
        inception.to(memory_format=FAST)
        with tempfile.TemporaryDirectory() as folder:
            items = {str(i): (lambda p=p: p) for i, p in enumerate(images)}
            compute(Path(folder), network, items)

    return {name: {"one by one": lambda n=network: one_by_one(n), "ours": lambda n=network: ours(n)}
            for name, network in compared.items()}  # fmt: skip


def table(what: str, rates: Mapping[str, list[float]], tera: float = 0.0) -> dict:
    """Prints medians and their ratios to the first; gives them back."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    first = next(iter(medians.values()))
    header = (what, "images/s", "ratio", *(["TFLOP/s"] if tera else []))
    print_table(header, [(name, f"{rate:.2f}", f"{rate / first:.2f}", *([f"{tera * rate:.3f}"] if tera else []))
                         for name, rate in medians.items()])  # fmt: skip
    return {"medians": medians, "ratios": {name: rate / first for name, rate in medians.items()}}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="storybook")
    parser.add_argument("--variant", default="bk_small", help="a student's name, or teacher")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--batch-sizes", type=lambda text: [int(b) for b in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=FOLDER / "evaluation.json")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidates, tera = samplers(chosen, device)
    results = {"sampling": table("sampling", turns(candidates, chosen.images, chosen.rounds), tera)}
    scenes = [sample_scene(i, "test") for i in range(64)]
    images = [render(scene, i, 256) for i, scene in enumerate(scenes)]
    for name, ways in networks(images, device).items():
        results[name] = table(f"{name} features", turns(ways, len(images), chosen.rounds))
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output, {"preset": chosen.preset, "variant": chosen.variant, **results,
                               "provenance": provenance(device)})  # fmt: skip


if __name__ == "__main__":
    main()
