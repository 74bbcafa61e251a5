"""What a DreamBooth run costs: seconds a step and memory, full and by LoRA, with random weights.

    python benchmarks/dreambooth.py                                          # SD-v1.4's Base at 512 pixels, one step
    python benchmarks/dreambooth.py --variant teacher,bk_base --steps 100    # for a GPU

Every measurement is a process of its own. BK-SDM's authors say 10 to 20 minutes for 800 steps on an RTX 3090.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from kd import FOLDER, random_teacher

from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.core.surgery import build_student
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.dreambooth.job import prepare
from bksdm_utils.dreambooth.subjects import class_prompts, load_subject
from bksdm_utils.files import write_json
from bksdm_utils.models.pipelines import load_pipeline, sampling_dtype, with_unet
from bksdm_utils.workbook.headless import print_table
from bksdm_utils.workbook.run import provenance


def measure(chosen: argparse.Namespace) -> dict[str, float]:
    """One run of so many steps, after one that is not counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = DreamBoothTraining.filled(
        preset=chosen.preset, max_train_steps=1 + chosen.steps, identifier="z",
        gradient_checkpointing=chosen.gradient_checkpointing,
    ).for_method(chosen.method)  # fmt: skip
    path = random_teacher(config, FOLDER / f"teacher-{config.preset}")
    pipe = load_pipeline(path, device, sampling_dtype(device))
    if chosen.variant != "teacher":
        pipe = with_unet(pipe, build_student(pipe.unet, chosen.variant))
    subject = load_subject("tabby")
    class_images = [(p.text, render(sample_scene(i), i)) for i, p in enumerate(class_prompts(subject, 2))]
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(pipe, subject, config, Path(folder), class_images)
        rows = [step.floats() for step in run.steps()][1:]
        return {"seconds_per_step": sum(row["seconds"] for row in rows) / len(rows),
                "memory_gb": max(row["memory_gb"] for row in rows), "trained": run.model.num_trained,
                "file_mb": run.save() / 1e6}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="sd-v1.4")
    parser.add_argument("--variant", default="bk_base", help="teacher or students' names, with commas")
    parser.add_argument("--method", default="full,lora")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps that are counted")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER / "dreambooth.json")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        write_json(chosen.output, measure(chosen))
        return
    results = {}
    for variant in chosen.variant.split(","):
        for method in chosen.method.split(","):
            results[f"{variant}, {method}"] = in_a_process(chosen, variant, method)
    print_table(("run", "s per step", "memory GB", "trained parameters", "file MB"),
                [(name, f"{m['seconds_per_step']:.2f}", f"{m['memory_gb']:.1f}", f"{m['trained']:,}",
                  f"{m['file_mb']:.1f}") for name, m in results.items()])  # fmt: skip
    write_json(chosen.output, {"preset": chosen.preset, "steps": chosen.steps, "runs": results,
                               "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu")})  # fmt: skip


def in_a_process(chosen: argparse.Namespace, variant: str, method: str) -> dict[str, float]:
    """`measure` in a fresh process, whose memory is its own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    output = FOLDER / "run.json"
    checkpointing = ["--gradient-checkpointing"] if chosen.gradient_checkpointing else []
    command = [sys.executable, __file__, "--measure", "--preset", chosen.preset, "--variant", variant,
               "--method", method, "--steps", str(chosen.steps), "--output", str(output), *checkpointing]  # fmt: skip
    subprocess.run(command, check=True)
    print(f"{variant}, {method} done", flush=True)
    return json.loads(output.read_text())


if __name__ == "__main__":
    main()
