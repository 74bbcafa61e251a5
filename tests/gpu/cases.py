"""Cases that run on the stub GPU and on the CPU: functions of a `Place` that return values for JSON.

python tests/gpu/cases.py RESULTS TEACHER NAME…      runs them, each in a fork of one process, on the stub
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bksdm_utils  # noqa: F401  before torch, whose threads it tells how to wait

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu import emulation
from PIL import Image

from bksdm_utils.config.training import KDTraining
from bksdm_utils.files import read_log, write_json
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.job import KDJob, prepare, train


@dataclass(frozen=True)
class Place:
    """Where a case runs: a device, an empty folder, and a narrow Stable Diffusion."""

    device: str
    folder: Path
    teacher: Path


@dataclass(frozen=True)
class Case:
    """A function, the environment of its process, and whether values are computed or only sizes count."""

    run: Callable[[Place], object]
    environment: dict[str, str]
    values: bool = True


CASES: dict[str, Case] = {}


def case(name: str, *args, gpus: int = 1, capability: str = "9.0", memory_gb: float = 80, values: bool = True):
    """Registers a function as the case `name`; `args` follow its place."""
    environment = {"COUNT": gpus, "CAPABILITY": capability, "MEMORY": memory_gb}

    def register(function):
        variables = {f"STUB_GPU_{name}": str(value) for name, value in environment.items()}
        CASES[name] = Case(lambda place: function(place, *args), variables, values)
        return function

    return register


# --- what cases share


def images(folder: Path, count: int) -> str:
    """A folder of small images of noise with captions."""
    folder = folder / "images"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,a cat {i}\n" for i in range(count))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    return str(folder)


def kd_config(place: Place, **parameters) -> KDTraining:
    """Notebook 03's parameters for the narrow teacher: two steps of one micro-batch of two images."""
    chosen = {
        "preset": "sd-v1.4", "variant": "bk_small", "teacher": str(place.teacher), "device": place.device,
        "train_data_dir": images(place.folder, 4), "cache_dir": str(place.folder / "cache"), "resolution": 64,
        "batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": 2, "validation_steps": 2,
        "checkpoint_steps": 0, "learning_rate": 1e-3, "lr_warmup_steps": 0, "ema_decay": 0.9, "mixed_precision": "no",
        "gradient_checkpointing": False, **parameters,
    }  # fmt: skip
    return KDTraining.filled(**chosen)


def kd_job(place: Place, folder: str = "run", resume: bool = False, **parameters) -> KDJob:
    """A distillation ready for its first step, validated by a number of its weights."""
    config = kd_config(place, **parameters)
    (place.folder / folder).mkdir(exist_ok=True)
    job = prepare(config, place.folder / folder, place.device, lambda pipeline: {"score": size(pipeline.unet)})
    job.begin(resume)
    return job


def size(model: torch.nn.Module) -> float:
    """The mean of the absolute weights."""
    return float(sum(p.detach().cpu().double().abs().sum() for p in model.parameters()) / 1e6)


def averaged_size(job: KDJob) -> float:
    with job.trainer.ema_weights() as model:
        return size(model)


def logged(job: KDJob, *names: str) -> dict[str, list[float]]:
    """Trains to the end; columns of the log."""
    for _ in job.steps():
        pass
    rows = read_log(job.dir / "log.csv")
    return {name: [row[name] for row in rows] for name in names or ("loss", "gradient_norm", "skipped")}


def pixels(sampled) -> list[list[int]]:
    """Images as flat lists of numbers."""
    return [np.asarray(image).ravel().tolist() for image in sampled]


# --- the stub itself


@case("device", gpus=2, capability="7.5", memory_gb=1)
def device(place: Place):
    """What torch finds, and its error when the memory ends."""
    try:
        torch.empty(2_000_000_000, dtype=torch.uint8, device=place.device)
    except torch.OutOfMemoryError as error:
        message = str(error)
    other = torch.ones(2, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        other + torch.ones(2, device="cuda:0")
    return {"count": torch.cuda.device_count(), "capability": torch.cuda.get_device_capability(), "error": message}


@case("arithmetic")
def arithmetic(place: Place):
    """Values of a convolution, an attention, their gradients, indexing and reductions, here and in another thread."""

    def compute(scale: float) -> list:
        rng = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, 4, 6, 6, generator=rng).to(place.device).requires_grad_() for n in (2, 4))
        y = F.conv2d(scale * x, weight, padding=2, stride=2)
        rows = y.flatten(2)
        z = F.scaled_dot_product_attention(rows, rows, rows).half().softmax(-1)
        (z.float().square().sum() + F.layer_norm(rows, rows.shape[-1:])[0, 0].sum()).backward()
        masked = y[y > 0.1].detach()
        return [t.float().cpu().tolist() for t in (y, z, x.grad, weight.grad, masked, y.nonzero(), y.argmax())]

    with ThreadPoolExecutor(1) as pool:
        return [compute(1.0), pool.submit(compute, 2.0).result()]


@case("waits")
def waits(place: Place):
    """How many waits are counted in each of these."""
    x, host, pinned = torch.ones(4, device=place.device), torch.ones(4), torch.ones(4).pin_memory()
    doing = {
        "arithmetic": lambda: x + x,
        "item": lambda: x.sum().item(),
        "mask": lambda: x[x > 0],
        "to host": lambda: x.cpu(),
        "from host": lambda: host.to("cuda"),
        "from host, asked not to wait": lambda: host.to("cuda", non_blocking=True),
        "from pinned": lambda: pinned.to("cuda", non_blocking=True),
        "to pinned": lambda: pinned.copy_(x, non_blocking=True),
        "synchronize": lambda: torch.cuda.synchronize(),
    }
    counts = {}
    for name, do in doing.items():
        with emulation.syncs() as found:
            do()
        counts[name] = found.total()
    return counts


# --- a distillation step


@case("kd_fp32", "no")
@case("kd_bf16", "bf16")
@case("kd_fp16", "fp16")
def kd(place: Place, mixed_precision: str, **parameters):
    job = kd_job(place, mixed_precision=mixed_precision, **parameters)
    types = {job.student.dtype, job.pipe.unet.dtype} | {p.dtype for p in job.pipe.text_encoder.parameters()}
    losses = logged(job)
    return {**losses, "student": size(job.student), "ema": averaged_size(job), "types": sorted(map(str, types)),
            "scaler": job.trainer.scaler.is_enabled()}  # fmt: skip


@case("kd_fp32_checkpointing", "no")
@case("kd_bf16_checkpointing", "bf16")
def kd_checkpointing(place: Place, mixed_precision: str):
    return kd(place, mixed_precision, gradient_checkpointing=True)


@case("kd_ema_on_the_cpu")
def kd_ema_on_the_cpu(place: Place):
    return kd(place, "no", ema_device="cpu")


@case("kd_overflow")
def kd_overflow(place: Place):
    """The second of three steps has infinite gradients."""
    job, calls, sizes, rows = kd_job(place, mixed_precision="fp16", max_train_steps=3), 0, [], []

    def overflowing(model, batch):
        nonlocal calls
        calls += 1
        losses = job.losses(model, batch)
        return losses | {"loss": losses["loss"] * (float("inf") if calls == 2 else 1.0)}

    for step in job.trainer.steps(overflowing, job.batches(job.config)):
        rows.append(step.floats())
        sizes.append(size(job.student))
    job.distillation.close()
    return {"loss": [row["loss"] for row in rows], "skipped": [row["skipped"] for row in rows], "sizes": sizes,
            "scale": job.trainer.scaler.get_scale()}  # fmt: skip


@case("kd_resumed")
def kd_resumed(place: Place):
    """Losses of an unbroken fp16 run of two steps, and of one that is resumed after its first."""
    parameters = {"mixed_precision": "fp16", "checkpoint_steps": 1}
    whole = kd_job(place, "whole", **parameters)
    losses = logged(whole, "loss")["loss"]
    logged(kd_job(place, "stopped", **parameters, max_train_steps=1))
    resumed = kd_job(place, "stopped", resume=True, **parameters)
    at = resumed.trainer.step
    again = logged(resumed, "loss")["loss"]
    return {"whole": losses, "resumed": again, "at": at, "sizes": [size(whole.student), size(resumed.student)]}


@case("train_command")
def train_command(place: Place):
    """`train`, as the command does it in one process."""
    config, folder = kd_config(place, gradient_checkpointing=None), place.folder / "run"
    folder.mkdir()
    write_json(folder / "config.json", config.model_dump(mode="json"))
    train(config, folder, place.device, lambda pipeline: {"score": size(pipeline.unet)})
    saved = sorted(p.name for p in folder.iterdir() if p.is_dir())
    return {"loss": [row["loss"] for row in read_log(folder / "log.csv")], "saved": saved,
            "score": [row["score"] for row in read_log(folder / "validation.csv")]}  # fmt: skip


# --- waits of the host


def _waits(trainer, loss_function, batches) -> Counter:
    """Waits in two optimizer steps, after one that is not counted."""
    with emulation.syncs() as found:
        for step in trainer.steps(loss_function, batches):
            if step.step == 1:
                before = Counter(found)
    return found - before


def _by_part(one: Counter, two: Counter) -> dict[str, dict[str, float]]:
    """Waits by line of each micro-batch, and of each step beside its micro-batches.

    Args:
        one, two: waits in two steps of one micro-batch, and of two.
    """
    micro_batch = {line: (two[line] - one[line]) / 2 for line in sorted(one | two)}
    step = {line: one[line] / 2 - micro_batch[line] for line in micro_batch}
    nonzero = ({line: count for line, count in part.items() if count} for part in (micro_batch, step))
    return dict(zip(("micro_batch", "step"), nonzero, strict=True))


@case("syncs_kd_fp32", "no")
@case("syncs_kd_bf16", "bf16")
@case("syncs_kd_fp16", "fp16")
@case("syncs_kd_ema_on_the_cpu", "no", "cpu")
def syncs_kd(place: Place, mixed_precision: str, ema_device: str | None = None):
    counts = []
    for number in (1, 2):
        job = kd_job(place, f"run{number}", mixed_precision=mixed_precision, gradient_accumulation_steps=number,
                     max_train_steps=3, ema_device=ema_device)  # fmt: skip
        counts.append(_waits(job.trainer, job.losses, job.batches(job.config)))
        job.distillation.close()
    return _by_part(*counts)


@case("syncs_pndm", "pndm")
@case("syncs_dpm++", "dpm++")
@case("syncs_euler", "euler")
@case("syncs_ddim", "ddim")
@case("syncs_lcm", "lcm")
def syncs_sampling(place: Place, scheduler: str):
    """Waits by line of each sampling step."""
    from bksdm_utils.evaluation.sampling import generate

    pipeline, counts = load_pipeline(place.teacher, place.device, torch.float16), []
    for steps in (5, 8):
        with emulation.syncs() as found:
            generate(pipeline, ["a cat", "a tree"], num_inference_steps=steps, scheduler=scheduler, guidance_scale=2.0)
        counts.append(found)
    few, many = counts
    return {"step": {line: (many[line] - few[line]) / 3 for line in sorted(few | many) if many[line] != few[line]}}


@case("syncs_dreambooth_full", "full")
@case("syncs_dreambooth_lora", "lora")
def syncs_dreambooth(place: Place, method: str):
    """Waits of each group of one subject's image and one class image, and of each step beside."""
    counts = []
    for number in (1, 2):
        run = dreambooth_run(place, method, f"run{number}", gradient_accumulation_steps=number)
        counts.append(_waits(run.trainer, run.losses, run.batches))
    return _by_part(*counts)


# --- sampling


@case("sample_pndm", "pndm")
@case("sample_dpm++", "dpm++")
@case("sample_euler", "euler")
@case("sample_ddim", "ddim")
@case("sample_lcm", "lcm")
def sampled(place: Place, scheduler: str):
    from bksdm_utils.evaluation.sampling import generate

    pipeline, options = load_pipeline(place.teacher, place.device), {"num_inference_steps": 4, "guidance_scale": 2.0}
    return pixels(generate(pipeline, ["a cat", "a tree"], scheduler=scheduler, batch_size=2, **options))


@case("one_image")
def one_image(place: Place):
    """Batch sizes of the U-Net and of the decoder when one prompt is asked for and eight fit."""
    from bksdm_utils.evaluation.sampling import generate

    pipeline, batches = load_pipeline(place.teacher, place.device), []
    pipeline.unet.register_forward_pre_hook(lambda _, args, kw: batches.append(len(kw.get("sample", *args[:1]))),
                                            with_kwargs=True)  # fmt: skip
    images = generate(pipeline, ["a cat"], num_inference_steps=4, batch_size=8, guidance_scale=2.0)
    return {"images": len(images), "unet": sorted(set(batches))}


@case("sample_command")
def sample_command(place: Place):
    """`sample`, as the command does it in one process."""
    from bksdm_utils.config.evaluation import SampleFolder
    from bksdm_utils.workbook.jobs import run_job

    config = SampleFolder(teacher=str(place.teacher), device=place.device, num_images=3, num_inference_steps=4)
    folder = place.folder / "sampled"
    folder.mkdir()
    write_json(folder / "config.json", config.model_dump(mode="json"))
    run_job(config, folder)
    return pixels(Image.open(path) for path in sorted((folder / "images").glob("*.png")))


# --- scores


@case("scores")
def scores(place: Place):
    """FID, Inception score and CLIP score of tensors on the device, of storybook's renders."""
    from bksdm_utils.config.shared import Teacher
    from bksdm_utils.data.rendering import render
    from bksdm_utils.data.scenes import sample_scene
    from bksdm_utils.evaluation import metrics
    from bksdm_utils.evaluation.networks import MetricClip

    clip = MetricClip(Teacher.filled().chosen_preset.common["clip"], place.device)
    scenes = [sample_scene(i, "test") for i in range(12)]
    renders = [[render(scene, seed + i) for i, scene in enumerate(scenes)] for seed in (0, 100)]
    features, real = (clip.image_network(some) for some in renders)
    logits = clip.storybook_logits(clip.images(renders[0]))
    return {
        "fid": metrics.fid(features, real),
        "inception_score": metrics.inception_score(logits.cpu().numpy()).value,
        "clip_score": metrics.clip_score(clip, renders[0], [scene.caption for scene in scenes]),
    }


@case("validation")
def validation(place: Place):
    """Scores of a validation in training: the storybook teacher's."""
    from bksdm_utils.evaluation.scorer import Scorer

    config = KDTraining.filled(device=place.device, num_images=2, num_validation_images=4, num_inference_steps=4)
    return Scorer(config, place.device).validate(load_pipeline(config.teacher, place.device), num_inference_steps=4)


# --- latents


@case("latents")
def latents(place: Place):
    """Cached moments and the cache's key in every precision; how many images each call of the encoder takes."""
    from bksdm_utils.training.latents import load_latents

    result = {}
    for name in ("no", "bf16", "fp16"):
        job = kd_job(place, name, mixed_precision=name, cache_dir=str(place.folder / f"cache-{name}"))
        mean, std = job.data.moments(range(4), [0] * 4)
        result[name] = {"key": job.data.key, "mean": mean.tolist(), "std": std.tolist()}
        job.distillation.close()
    pipeline, sizes = load_pipeline(place.teacher, place.device), []
    encoder = pipeline.vae.encoder.forward
    pipeline.vae.encoder.forward = lambda x, *rest, **named: sizes.append(len(x)) or encoder(x, *rest, **named)
    load_latents(kd_config(place, cache_dir=str(place.folder / "another")), pipeline)
    return result | {"encoded": sorted(set(sizes))}


@case("decoding")
def decoding(place: Place):
    """How many images each call of the decoder takes when 24 are sampled in one pass."""
    from bksdm_utils.evaluation.sampling import generate

    pipeline, sizes = load_pipeline(place.teacher, place.device), []
    decoder = pipeline.vae.decoder.forward
    pipeline.vae.decoder.forward = lambda x, *rest, **named: sizes.append(len(x)) or decoder(x, *rest, **named)
    generate(pipeline, ["a cat"] * 24, num_inference_steps=1, scheduler="ddim", batch_size=24)
    return {"sizes": sorted(set(sizes)), "images": sum(sizes), "slicing": pipeline.vae.use_slicing}


# --- faults of one kind each


@case("precision_9.0", capability="9.0")
@case("precision_8.0", capability="8.0")
@case("precision_7.5", capability="7.5")
def chosen_precision(place: Place):
    from bksdm_utils.training.job import precision

    asked = ("no", "bf16", "fp16")
    return {name: precision(kd_config(place, mixed_precision=name), place.device) for name in asked}


@case("kd_bf16_on_a_t4", capability="7.5")
def kd_on_a_t4(place: Place):
    return kd(place, "bf16")


def fill_memory(leave: int = 1_000_000) -> torch.Tensor:
    """A tensor that takes what is free on the GPU."""
    torch.cuda.empty_cache()
    return torch.empty(torch.cuda.mem_get_info()[0] - leave, dtype=torch.uint8, device="cuda")


@case("training_beyond_the_memory", memory_gb=0.5)
def training_beyond_the_memory(place: Place):
    job = kd_job(place)
    ballast = fill_memory()
    return logged(job), len(ballast)


@case("sampling_beyond_the_memory", memory_gb=0.5)
def sampling_beyond_the_memory(place: Place):
    from bksdm_utils.evaluation.sampling import generate

    pipeline = load_pipeline(place.teacher, place.device)
    ballast = fill_memory()
    return len(generate(pipeline, ["a cat"] * 8, num_inference_steps=4, batch_size=8)), len(ballast)


@case("scoring_beyond_the_memory", memory_gb=0.5)
def scoring_beyond_the_memory(place: Place):
    from bksdm_utils.config.shared import Teacher
    from bksdm_utils.evaluation.networks import MetricClip

    clip = MetricClip(Teacher.filled().chosen_preset.common["clip"], place.device)
    ballast = fill_memory()
    return clip.images([Image.new("RGB", (64, 64))] * 8), len(ballast)


@case("encoding_beyond_the_memory", memory_gb=0.02)
def encoding_beyond_the_memory(place: Place):
    return kd(place, "no")


@case("norms")
def norms(place: Place):
    """dtypes of the results of both networks' norms in a bf16 step, with norms in its precision and without."""

    def found(low_precision_norms: bool) -> list[str]:
        name, dtypes = f"norms_{low_precision_norms}", set()
        job = kd_job(place, name, mixed_precision="bf16", low_precision_norms=low_precision_norms, max_train_steps=1)
        for module in (*job.student.modules(), *job.pipe.unet.modules()):
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                module.register_forward_hook(lambda _module, _inputs, output: dtypes.add(str(output.dtype)))
        logged(job)
        return sorted(dtypes)

    return {"low": found(True), "full": found(False)}


@case("peak_memory")
def peak(place: Place):
    """Peak of a U-Net on the GPU alone, and beside another network of 40 MB."""
    from bksdm_utils.costs.measuring import peak_memory

    unet = load_pipeline(place.teacher).unet.to(place.device)
    alone = peak_memory(unet)
    other = torch.empty(10_000_000, device=place.device)
    return {"alone": alone, "beside": peak_memory(unet), "other": other.nbytes}


@case("two_precisions")
def two_precisions(place: Place):
    """Two runs of different precision in one process."""
    return {name: logged(kd_job(place, name, mixed_precision=name), "loss")["loss"] for name in ("no", "fp16", "bf16")}


@case("validation_of_nothing")
def validation_of_nothing(place: Place):
    """How often EMA weights are swapped in by a validation that has nothing to sample, and by one with scores."""
    from bksdm_utils.training.job import prepare

    folder = place.folder / "unscored"
    folder.mkdir()
    unscored = prepare(kd_config(place), folder, place.device, None)
    unscored.begin(False)
    swaps = {}
    for name, job in (("unscored", unscored), ("scored", kd_job(place))):
        with counting_copies() as copies:
            job.validate()
        swaps[name] = len(copies)
        job.distillation.close()
    return swaps


@contextmanager
def counting_copies():
    """Within the block a list gets an entry for each time that averaged weights are copied into a model."""
    from diffusers.training_utils import EMAModel

    copy_to, found = EMAModel.copy_to, []
    EMAModel.copy_to = lambda *args, **kwargs: found.append(1) or copy_to(*args, **kwargs)
    try:
        yield found
    finally:
        EMAModel.copy_to = copy_to


@case("halves_saved", "fp16")
@case("bf16_saved", "bf16")
def halves_saved(place: Place, dtype: str):
    """A pipeline in half precision, exported, loaded by plain diffusers: dtypes, and an image on the CPU."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    from bksdm_utils.deploy.formats import save_diffusers
    from bksdm_utils.models.devices import DTYPES

    pipeline = load_pipeline(place.teacher, place.device, DTYPES[dtype])
    save_diffusers(pipeline, place.folder / "export", card(place))
    again = StableDiffusionPipeline.from_pretrained(place.folder / "export")
    parts = {name: str(getattr(again, name).dtype) for name in ("unet", "vae", "text_encoder")}
    again.set_progress_bar_config(disable=True)
    image = again("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    tensors = [t for file in (place.folder / "export").glob("*/*.safetensors") for t in load_file(file).values()]
    saved = {str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
    return {"dtypes": parts, "saved": sorted(saved), "image": pixels([image])[0]}


def card(place: Place):
    from huggingface_hub import ModelCard

    return ModelCard("---\nmodel_name: bk_small\n---\n# narrow")


# --- slow ones


def dreambooth_run(place: Place, method: str, folder: str = "run", **parameters):
    """DreamBooth of the subject tabby, three steps of one of its images and one class image."""
    from bksdm_utils.config.dreambooth import DreamBoothTraining
    from bksdm_utils.data.rendering import render
    from bksdm_utils.data.scenes import sample_scene
    from bksdm_utils.dreambooth.job import prepare
    from bksdm_utils.dreambooth.subjects import class_prompts, load_subject

    chosen = {
        "identifier": "z", "max_train_steps": 3, "batch_size": 1, "gradient_accumulation_steps": 1, "lora_rank": 4,
        "full_learning_rate": 1e-3, "lora_learning_rate": 1e-2, "lora_targets": "to_q,to_v", "lora_text_rank": 2,
        "train_text_encoder": True, "lr_schedule": "constant", "resolution": 64, "prior_loss_weight": 1.0, **parameters,
    }  # fmt: skip
    subject = load_subject("tabby")
    class_images = [(p.text, render(sample_scene(i), i)) for i, p in enumerate(class_prompts(subject, 3))]
    config = DreamBoothTraining.filled(**chosen).for_method(method)
    return prepare(load_pipeline(place.teacher, place.device), subject, config, place.folder / folder, class_images)


@case("dreambooth_full", "full", "no")
@case("dreambooth_lora", "lora", "no")
@case("dreambooth_full_fp16", "full", "fp16")
@case("dreambooth_lora_bf16", "lora", "bf16")
def dreambooth(place: Place, method: str, mixed_precision: str):
    """Losses, and an image of what was learned."""
    from bksdm_utils.evaluation.sampling import generate

    run = dreambooth_run(place, method, mixed_precision=mixed_precision)
    losses = [float(step.losses["loss"]) for step in run.steps()]
    images = generate(run.pipeline, ["a z cat"], num_inference_steps=4, guidance_scale=2.0, batch_size=1)
    return {"loss": losses, "image": pixels(images)[0], "bytes": run.save()}


@case("lcm", "no")
def lcm(place: Place, mixed_precision: str):
    """Three steps of consistency distillation; an image in two steps by what was saved and loaded again."""
    from bksdm_utils.config.deploy import DemoAndExport
    from bksdm_utils.core.surgery import build_student
    from bksdm_utils.deploy.few_step import prepare_few_step, save_few_step
    from bksdm_utils.evaluation.sampling import generate
    from bksdm_utils.models.pipelines import with_unet

    config = DemoAndExport.filled(
        preset="storybook", teacher=str(place.teacher), device=place.device, train_data_dir=images(place.folder, 4),
        cache_dir=str(place.folder / "cache"), resolution=64, batch_size=2, lcm_steps=3, few_steps="1,2",
        guidance_scale=2.0, num_inference_steps=4,
    )  # fmt: skip
    teacher = load_pipeline(place.teacher, place.device)
    student = with_unet(teacher, build_student(teacher.unet, "bk_small"))
    distillation, batches, trainer = prepare_few_step(config, student, teacher.unet, place.folder / "run")
    losses = [step.floats()["loss"] for step in trainer.steps(distillation.losses, batches)]
    save_few_step(student, distillation, trainer, place.folder / "few")
    few = load_pipeline(place.folder / "few", place.device)
    return {"loss": losses, "image": pixels(generate(few, ["a cat"], num_inference_steps=2, guidance_scale=1.0))[0],
            "scheduler": type(few.scheduler).__name__}  # fmt: skip


@case("export_diffusers", "diffusers")
@case("export_single_file", "single_file")
def exported(place: Place, kind: str):
    """An export of a pipeline on the device, loaded by plain diffusers: an image on the CPU."""
    from diffusers import StableDiffusionPipeline

    from bksdm_utils.deploy.export import export

    megabytes = export(load_pipeline(place.teacher, place.device), place.folder, kind, card(place))
    folder = place.folder / kind
    if kind == "diffusers":
        again = StableDiffusionPipeline.from_pretrained(folder)
    else:
        options = {"config": str(folder / "config"), "local_files_only": True}
        again = StableDiffusionPipeline.from_single_file(str(next(folder.glob("*.safetensors"))), **options)
    again.set_progress_bar_config(disable=True)
    image = again("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    return {"megabytes": megabytes > 0, "image": pixels([image])[0]}


@case("second_gpu", gpus=2)
def second_gpu(place: Place):
    """A run whose process is given the second GPU, as a launcher does it: LOCAL_RANK 1 of two, without a partner."""
    if place.device == "cuda":
        torch.cuda.set_device(1)
    values = kd(place, "no")
    used = [place.device == "cuda" and torch.cuda.max_memory_allocated(number) > 0 for number in (0, 1)]
    return values | {"used": used}
