"""How fast distillation trains: ours beside a plain loop with the original's published settings, on one machine.

    python benchmarks/kd.py                                              # storybook, a few minutes on a CPU
    python benchmarks/kd.py --preset sd-v1.4 --variant bk_base --batch-size 64    # random weights, for a GPU

Every measurement is a process of its own; plain and ours take turns, and the ratio of their medians is what counts,
for machines differ and are seldom idle. The plain loop does what BK-SDM's kd_train.sh of 2023 asks for: autoencoder and
text encoder in the loop, images opened and cropped in the main process, gradient checkpointing, four losses read by
the host in every step, EMA tensor by tensor, default memory format. It is written from those facts, not copied.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from bksdm_utils.config.presets import PRESETS
from bksdm_utils.config.training import KDTraining
from bksdm_utils.core.losses import training_target
from bksdm_utils.core.plans import student_config
from bksdm_utils.core.surgery import build_student, random_unet
from bksdm_utils.core.taps import tap_pairs
from bksdm_utils.costs.counting import count
from bksdm_utils.data.images import to_pixels
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import SIZE, sample_scene
from bksdm_utils.files import ROOT, write_json
from bksdm_utils.models.configs import teacher_config
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.job import DTYPES, precision, prepare
from bksdm_utils.training.step import memory
from bksdm_utils.workbook.headless import print_table
from bksdm_utils.workbook.run import provenance

WARM_UP = 3  # optimizer steps that are not counted
FOLDER = ROOT / "outputs" / "benchmark"


def image_folder(resolution: int, count: int) -> Path:
    """An image-text folder of storybook scenes at about the size that training asks for."""
    folder = FOLDER / f"images-{resolution}-{count}"
    if not (folder / "metadata.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = ["file_name,text"]
        for seed in range(count):
            scene = sample_scene(seed)
            side = max(SIZE, resolution * 5 // 4)
            render(scene, seed).resize((side, side)).save(folder / f"{seed}.jpg", quality=90)
            rows.append(f"{seed}.jpg,{scene.caption}")
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def random_teacher(config: KDTraining, folder: Path) -> Path:
    """A whole Stable Diffusion of the teacher's size with random weights, and the storybook's small tokenizer."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    if (folder / "model_index.json").exists():
        return folder
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "data" / "storybook" / "clip")
    tokenizer.model_max_length = teacher_config(config, "text_encoder").get("max_position_embeddings", 77)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(teacher_config(config, "vae")), tokenizer=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**teacher_config(config, "text_encoder"))),
        unet=random_unet(teacher_config(config)),
        scheduler=PNDMScheduler.from_config(teacher_config(config, "scheduler")),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


class Images(Dataset):
    """An image-text folder, opened and cropped whenever asked for."""

    def __init__(self, folder: Path, resolution: int, tokenizer):
        rows = [line.split(",", 1) for line in (folder / "metadata.csv").read_text().splitlines()[1:]]
        self.paths, captions = [folder / name for name, _ in rows], [text for _, text in rows]
        self.ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.resolution = resolution

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image

        return to_pixels(Image.open(self.paths[i]), self.resolution), self.ids[i]


def _plain_networks(config: KDTraining, device: str, dtype: torch.dtype) -> tuple:
    """Pipeline and student with hooks that keep what is compared: (pipeline, student, pairs of taps, what was kept)."""
    pipe = load_pipeline(config.teacher, device)
    student = build_student(pipe.unet, config.variant)
    for unet in (pipe.unet, student):
        unet.to(memory_format=torch.contiguous_format)
    student.enable_gradient_checkpointing()
    student.train()
    pipe.to(dtype=dtype)
    kept = {"teacher": {}, "student": {}}
    pairs = tap_pairs(config.variant, pipe.unet.config)
    for which, unet, side in (("teacher", pipe.unet, 0), ("student", student, 1)):
        for pair in pairs:
            keep = lambda _m, _i, out, n=pair, w=which: kept[w].update({n: out[0] if isinstance(out, tuple) else out})  # noqa: E731
            unet.get_submodule(pair[side]).register_forward_hook(keep)
    return pipe, student, pairs, kept


def plain(config: KDTraining, device: str) -> Iterator[int]:
    """The plain loop; yields the number of images of every step."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    dtype = DTYPES[precision(config, device)]
    pipe, student, pairs, kept = _plain_networks(config, device, dtype)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate)
    ema = EMAModel(student.parameters(), decay=config.ema_decay)
    data = Images(Path(config.train_data_dir), config.resolution, pipe.tokenizer)
    loader = DataLoader(data, config.batch_size, shuffle=True, drop_last=True)
    while True:
        for pixels, ids in loader:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                latents = (
                    pipe.vae.encode(pixels.to(device, dtype)).latent_dist.sample() * pipe.vae.config.scaling_factor
                )
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=device)
                noisy, text = schedule.add_noise(latents, noise, timesteps), pipe.text_encoder(ids.to(device))[0]
                by_teacher = pipe.unet(noisy, timesteps, text).sample
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                by_student = student(noisy, timesteps, text).sample
                target = training_target(schedule, latents, noise, timesteps)
                task = F.mse_loss(by_student.float(), target.float())
                output = F.mse_loss(by_student.float(), by_teacher.float())
                feature = sum(F.mse_loss(kept["student"][p].float(), kept["teacher"][p].float()) for p in pairs)
                loss = task + output + feature
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(student.parameters())
            for value in (loss, task, output, feature):
                value.item()
            yield len(pixels)


def ours(config: KDTraining, device: str, folder: Path) -> Iterator[int]:
    """The workbook's own loop, cache and all, as notebook 03 and its command run it."""
    job = prepare(config, folder, device, lambda pipeline: {})
    job.begin(resume=False)
    for step in job.trainer.steps(job.losses, job.batches(config)):
        job.log.append(step.floats())
        yield job.trainer.config.global_batch_size


def measure(mode: str, config: KDTraining, folder: Path, steps: int) -> None:
    """Runs one loop and writes what it did; called in a process of its own, or in several that share the work."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = PartialState(cpu=device == "cpu")
    loop = plain(config, device) if mode == "plain" else ours(config, device, folder)
    for _ in range(WARM_UP):
        next(loop)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, images = time.perf_counter(), 0
    for _ in range(steps):
        images += next(loop)
    if device == "cuda":
        torch.cuda.synchronize()
    rate = images / (time.perf_counter() - started)
    if not state.is_main_process:
        return
    write_json(folder / "measured.json", {"images_per_second": rate, "seconds_per_step": images / steps / rate,
                                          "memory_gb": memory(), **provenance(device)})  # fmt: skip


def in_processes(mode: str, number: int, config: KDTraining, folder: Path, steps: int) -> dict:
    """`measure` in `number` fresh processes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    one = [sys.executable]
    several = [*one, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command = [*(one if number == 1 else several), __file__, "--measure", mode, "--folder", str(folder),
               "--steps", str(steps)]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "measured.json").read_text())


def configuration(chosen: argparse.Namespace, variant: str) -> KDTraining:
    """The parameters of notebook 03 for one measurement."""
    preset = PRESETS[chosen.preset]
    teacher = chosen.teacher
    if teacher is None and chosen.preset != "storybook":
        teacher = str(random_teacher(KDTraining.filled(preset=chosen.preset), FOLDER / f"teacher-{chosen.preset}"))
    resolution = chosen.resolution or preset.common["resolution"]
    return KDTraining.filled(
        preset=chosen.preset, variant=variant, teacher=teacher, resolution=resolution,
        train_data_dir=str(image_folder(resolution, max(8, 4 * chosen.batch_size))), cache_dir=str(FOLDER / "cache"),
        batch_size=chosen.batch_size, gradient_accumulation_steps=1, max_train_steps=WARM_UP + chosen.steps,
        validation_steps=10**6, checkpoint_steps=0, gradient_checkpointing=chosen.gradient_checkpointing,
        compiled=chosen.compiled, optimizer=chosen.optimizer,
    )  # fmt: skip


def tera_operations(config: KDTraining, variant: str, resolution: int) -> float:
    """10^12 operations that one image costs: the teacher forward, the student forward and backward."""
    own = KDTraining.filled(preset=config.preset)
    teacher = teacher_config(own)
    student = student_config(teacher, variant)
    factor = 2 ** (len(teacher_config(own, "vae")["block_out_channels"]) - 1)
    macs = [count(c, resolution // factor).macs_with_attention for c in (teacher, student)]
    return 2 * (macs[0] + 3 * macs[1]) / 1e12


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="storybook")
    parser.add_argument("--variant", default="bk_small", help="one, or several with commas")
    parser.add_argument("--teacher", help="a pipeline's folder; without, presets of the hub get random weights")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are counted")
    parser.add_argument("--rounds", type=int, default=3)
    number = torch.cuda.device_count() or 2
    modes = ",".join(["plain", "ours1", *([f"ours{number}"] if number > 1 else [])])
    parser.add_argument("--modes", default=modes, help="plain, or ours and the number of processes")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for ours; plain always has it")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--output", type=Path, default=FOLDER / "kd.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        config = KDTraining(**json.loads((chosen.folder / "config.json").read_text()))
        return measure(chosen.measure, config, chosen.folder, chosen.steps)
    results = [compare(chosen, variant) for variant in chosen.variant.split(",")]
    write_json(chosen.output, results)


def compare(chosen: argparse.Namespace, variant: str) -> dict:
    """All modes in turn, round after round; prints a table of medians and gives them back."""
    config, runs = configuration(chosen, variant), {mode: [] for mode in chosen.modes.split(",")}
    for turn in range(chosen.rounds):
        for mode in runs:
            number = int(mode.removeprefix("ours")) if mode != "plain" else 1
            kind = "plain" if mode == "plain" else "ours"
            runs[mode].append(in_processes(kind, number, config, FOLDER / f"{variant}-{mode}", chosen.steps))
            print(f"round {turn + 1} {variant} {mode}: {runs[mode][-1]['images_per_second']:.2f} images/s", flush=True)
    medians = {mode: statistics.median(m["images_per_second"] for m in rows) for mode, rows in runs.items()}
    tera = tera_operations(config, variant, config.resolution)
    first = next(iter(medians.values()))
    print_table(
        ("loop", "images/s", "s per step", "TFLOP/s", "memory GB", "ratio"),
        [(mode, f"{rate:.2f}", f"{chosen.batch_size / rate:.3f}", f"{tera * rate:.3f}",
          f"{max(m['memory_gb'] for m in runs[mode]):.2f}", f"{rate / first:.2f}")
         for mode, rate in medians.items()],
    )  # fmt: skip
    return {"preset": chosen.preset, "variant": variant, "batch_size": chosen.batch_size, "medians": medians,
            "ratios": {mode: rate / first for mode, rate in medians.items()}, "runs": runs}  # fmt: skip


if __name__ == "__main__":
    main()
