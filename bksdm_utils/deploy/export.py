"""The export formats, one way to run and try each, and the upload (notebook 06).

Each export is written under a temporary name and renamed at the end, never over anything that exists, and is loaded by
programs that do not know this package.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from ..config.deploy import DemoAndExport
from ..files import NotAvailable
from ..models.pipelines import Pipeline, with_unet
from .formats import NotExpressible, save_diffusers
from .graphs import save_core_ml, save_onnx
from .single_file import save_single_file

EXPORTERS: dict[str, Callable[[Pipeline, Path, ModelCard], str]] = {  # each returns a remark for its users
    "diffusers": save_diffusers,
    "single_file": lambda pipeline, folder, card: save_single_file(pipeline, folder, card.data.model_name),
    "onnx": lambda pipeline, folder, card: save_onnx(pipeline, folder),
    "core_ml": lambda pipeline, folder, card: save_core_ml(pipeline, folder),
}
LIMITS = {"diffusers": 0, "single_file": 1, "onnx": 2}  # mean difference from the pipeline's own image, of 255
PLAIN = """
import sys
sys.modules["bksdm_utils"] = None  # importing it raises
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
kind, name, prompt, seed, steps, guidance = sys.argv[1:]
if kind == "diffusers":
    pipe = StableDiffusionPipeline.from_pretrained(kind)
else:
    file, config = f"{kind}/{name}.safetensors", f"{kind}/config"
    pipe = StableDiffusionPipeline.from_single_file(file, config=config, local_files_only=True)
generator, options = torch.Generator().manual_seed(int(seed)), {"num_inference_steps": int(steps)}
pipe(prompt, generator=generator, guidance_scale=float(guidance), **options).images[0].save(f"{kind}.png")
"""
ONNX = """
import runpy, sys
sys.modules["bksdm_utils"] = None
runpy.run_path("onnx/sample.py", run_name="__main__")
"""


def export(pipeline: Pipeline, folder: Path, kind: str, card: ModelCard) -> float | None:
    """Writes folder/kind, in place of an earlier one of this function, and prints its size.

    Returns:
        megabytes; None where a package is missing or the format cannot hold the model, which is printed.

    Raises:
        ValueError: folder/kind exists and is somebody else's.
    """
    made_here = folder / f"{kind}.made_by_notebook_06"
    if made_here.is_file():
        shutil.rmtree(folder / kind, ignore_errors=True)
    try:
        remark = EXPORTERS[kind](pipeline, folder / kind, card)
    except (NotAvailable, NotExpressible) as error:
        print(f"{kind} is left out: {error}")
        return None
    made_here.touch()
    size = sum(file.stat().st_size for file in (folder / kind).rglob("*") if file.is_file()) / 1e6
    print(f"{kind}: {size:.1f} MB; {remark}")
    return size


def sample_elsewhere(
    folder: Path, kinds: Sequence[str], config: DemoAndExport, name: str
) -> dict[str, Image.Image | str]:
    """One image by each export in a process that cannot import this package; the error's text where that fails."""
    settings = str(config.seed), str(config.num_inference_steps), str(config.guidance_scale)
    options = (f"--{key}={value}" for key, value in zip(("seed", "steps", "guidance"), settings, strict=True))
    commands = {kind: [PLAIN, kind, name, config.prompt, *settings] for kind in kinds if kind in LIMITS}
    if "onnx" in commands:
        commands["onnx"] = [ONNX, config.prompt, *options, "--output=onnx.png"]
    started = {kind: subprocess.Popen([sys.executable, "-c", *command], cwd=folder, stderr=subprocess.PIPE, text=True)
               for kind, command in commands.items()}  # fmt: skip
    errors = {kind: process.communicate()[1] for kind, process in started.items()}
    return {kind: errors[kind][-2000:] if process.returncode else Image.open(folder / f"{kind}.png")
            for kind, process in started.items()}  # fmt: skip


def sample_here(pipeline: Pipeline, config: DemoAndExport) -> Image.Image:
    """The same image by the pipeline itself, with one thread and the memory layout of a loaded network, as there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    own = with_unet(pipeline, copy.deepcopy(pipeline.unet).to(memory_format=torch.contiguous_format))
    generator, steps = torch.Generator().manual_seed(config.seed), config.num_inference_steps
    images = own(config.prompt, generator=generator, num_inference_steps=steps, guidance_scale=config.guidance_scale)
    torch.set_num_threads(threads)
    return images.images[0]


def difference(image: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two images, of 255."""
    return float(np.abs(np.asarray(image, float) - np.asarray(other, float)).mean())


def upload(folder: str | Path, repo_id: str | None, push_to_hub: bool = False) -> None:
    """Lists what would be uploaded to the Hugging Face hub, and uploads it only with `push_to_hub`.

    Raises:
        ValueError: `push_to_hub` without a `repo_id`.
    """
    files = {path: path.stat().st_size / 1e6 for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    print(f"to {repo_id or '(no repo_id)'}, private if it is new: {len(files)} files, {sum(files.values()):.1f} MB")
    print("\n".join(f"  {path.relative_to(folder)}  {size:.2f} MB" for path, size in files.items()))
    if not push_to_hub:
        print("nothing was uploaded: push_to_hub is False")
        return
    if not repo_id:
        raise ValueError("push_to_hub is True, but repo_id is None: expected one such as name/bk-sdm-small")
    api = HfApi()
    api.create_repo(repo_id, private=True, exist_ok=True)
    print(f"{repo_id} is {'private' if api.repo_info(repo_id).private else 'public: everybody can see this upload'}")
    api.upload_folder(folder_path=folder, repo_id=repo_id)
