"""Training data: image-text folders or storybook scenes, encoded once to latents and token ids.

A picture that cannot be read or a caption that is empty is set aside with its reason; it never ends a run.
"""

from __future__ import annotations

import csv
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from . import storybook
from .engine import Draw
from .presets import ROOT, Preset, resolve


@dataclass(frozen=True)
class Example:
    """One picture, opened only when asked for, and its caption; `key` names its content for the cache."""

    name: str
    caption: str
    open: Callable[[], Image.Image]
    key: str


@dataclass
class LatentDataset:
    """Latents and token ids of a data set.

    Attributes:
        mean, std: moments of the VAE's posterior, already scaled, (N, F, 4, h, w); F is 2 with mirrored pictures.
        token_ids: (N, T); SDXL's two tokenizers give (N, 2, T).
        empty_ids: (1, T), or (1, 2, T), of the empty caption.
        captions: N texts.
        skipped: (name, reason) of every picture set aside.
        key: the cache's, a hash of everything the latents depend on.
    """

    mean: torch.Tensor
    std: torch.Tensor
    token_ids: torch.Tensor
    empty_ids: torch.Tensor
    captions: list[str]
    skipped: list[tuple[str, str]]
    key: str = ""

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, draw: Draw, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 4, h, w) sampled from the posterior, and token ids (B, T) or (B, 2, T)."""
        indices, flips = torch.tensor(draw.indices), draw.integers(self.mean.shape[1])
        mean, std = self.mean[indices, flips].float(), self.std[indices, flips].float()
        latents = mean + std * draw.normal(*mean.shape[1:])
        return latents.to(device), self.token_ids[indices].to(device)


def read_folder(folder: str | Path) -> tuple[list[Example], list[tuple[str, str]]]:
    """An image-text folder: pictures beside a metadata.csv with the columns file_name and text.

    Returns:
        the examples, and (name, reason) of every row set aside.

    Raises:
        ValueError: the folder or its metadata.csv is missing or malformed, or nothing usable is in it.
    """
    folder = Path(resolve(folder))
    rows = _rows(folder / "metadata.csv")
    examples, skipped = [], []
    for row in rows:
        name, text = (row["file_name"] or "").strip(), (row["text"] or "").strip()
        try:
            path = _inside(folder, name)
            if not text:
                raise ValueError("empty caption")
            examples.append(Example(name, text, lambda path=path: Image.open(path), _digest(path.read_bytes())))
        except (OSError, ValueError) as error:
            skipped.append((name or "(no name)", getattr(error, "strerror", None) or str(error)))
    if not examples:
        raise ValueError(
            f"{folder}: none of {len(rows)} rows is usable (first: {skipped[:1]}). Add pictures and captions."
        )
    return examples, skipped


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("file_name is empty or points outside the folder")
    return path


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.parent.is_dir():
        raise ValueError(
            f"{path.parent} is no folder: expected pictures and a metadata.csv with file_name, text. LAION's comes "
            "by python -m bksdm_utils.downloads laion_aes_212k (or _11k, _2256k)"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing: write a CSV file with the columns file_name and text")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        if not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}: expected file_name and text")
        try:
            return list(reader)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}. Look for a quote that is not closed."
            ) from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def storybook_examples(num_scenes: int, split: str = "train") -> list[Example]:
    """The first scenes of a storybook split."""
    world = _digest(Path(storybook.__file__).read_bytes())
    examples = []
    for seed in range(num_scenes):
        scene = storybook.sample_scene(seed, split)
        draw = lambda scene=scene, seed=seed: storybook.render(scene, seed)  # noqa: E731
        examples.append(Example(f"{split}-{seed}", scene.caption, draw, f"{world}-{split}-{seed}"))
    return examples


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """Any picture to (3, resolution, resolution) in -1 … 1: upright, RGB on white, shorter side scaled, centre crop."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip sixteen bits to eight, and show white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def load_latents(preset: Preset, pipeline: DiffusionPipeline, cache_dir: str | Path | None = None) -> LatentDataset:
    """The preset's training data as latents, from the cache where the same were computed before.

    The cache's key is a hash of every picture and caption, the VAE's weights, the resolution and the mirroring. First
    form: all moments are held in memory, 28 GB for 212,000 pictures of 512 pixels with both flips.
    """
    if preset.train_data_dir is None:
        examples, skipped = storybook_examples(preset.num_train_scenes), []
    else:
        examples, skipped = read_folder(preset.train_data_dir)
    cache_dir = Path(cache_dir or ROOT / "outputs" / "cache")
    key = _cache_key(examples, preset, pipeline)
    cache = cache_dir / f"latents-{key}.safetensors"
    if not cache.exists():
        _write_cache(cache, encode(examples, preset, pipeline))
    return replace(_read_cache(cache, examples, skipped, pipeline), key=key)


def _cache_key(examples: Sequence[Example], preset: Preset, pipeline: DiffusionPipeline) -> str:
    digest = hashlib.sha256(f"{preset.resolution}-{preset.flip}-{pipeline.vae.config.scaling_factor}".encode())
    for example in examples:
        digest.update(f"{example.key}{example.caption}".encode())
    for tensor in pipeline.vae.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(examples: Sequence[Example], preset: Preset, pipeline: DiffusionPipeline, batch_size: int = 32) -> dict:
    """Moments of the VAE's posterior, scaled, fp16: mean and std (N, F, 4, h, w), `index` of the examples used (N,),
    and `failed`: (name, reason) of pictures that could not be read."""
    vae, failed, index, means, stds = pipeline.vae, [], [], [], []
    batch_size = max(1, batch_size * 64 * 64 // preset.resolution**2)
    for batch in _batches(_opened(examples, preset.resolution, failed), batch_size):
        index += [i for i, _ in batch]
        pixels = torch.stack([p for _, p in batch])
        sides = [pixels, pixels.flip(-1)] if preset.flip else [pixels]
        posteriors = [vae.encode(side.to(vae.device, vae.dtype)).latent_dist for side in sides]
        means.append(torch.stack([p.mean for p in posteriors], 1).cpu())
        stds.append(torch.stack([p.std for p in posteriors], 1).cpu())
    if not index:
        raise ValueError(f"none of {len(examples)} pictures could be read (first: {failed[:1]})")
    factor = vae.config.scaling_factor
    moments = {"mean": torch.cat(means) * factor, "std": torch.cat(stds) * factor}
    return {**{k: v.half() for k, v in moments.items()}, "index": torch.tensor(index), "failed": failed}


def _opened(examples: Sequence[Example], resolution: int, failed: list) -> Iterator[tuple[int, torch.Tensor]]:
    for i, example in enumerate(tqdm(examples, "encoding", file=sys.stdout, mininterval=2, ascii=True, ncols=70)):
        try:
            yield i, to_pixels(example.open(), resolution)
        except Exception as error:  # PIL raises many kinds for a broken file; each sets that one picture aside
            failed.append((example.name, f"unreadable picture: {error}"))


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_cache(path: Path, encoded: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = "\n".join(
        "\t".join(str(part).replace("\n", " ").replace("\t", " ") for part in f) for f in encoded.pop("failed")
    )
    part = path.with_suffix(".part")
    save_file(encoded, part, metadata={"failed": failed})
    os.replace(part, path)


def _read_cache(path: Path, examples: Sequence[Example], skipped: list, pipeline) -> LatentDataset:
    with safe_open(path, "pt") as file:
        failed = [tuple(line.split("\t")) for line in file.metadata()["failed"].splitlines()]
        mean, std, index = (file.get_tensor(name) for name in ("mean", "std", "index"))
    captions = [examples[i].caption for i in index.tolist()]
    tokens, empty = token_ids(pipeline, captions), token_ids(pipeline, [""])
    return LatentDataset(mean, std, tokens, empty, captions, [*skipped, *failed])


def token_ids(pipeline: DiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Captions as the pipeline's text encoder takes them, (N, T); for SDXL's two text encoders (N, 2, T)."""

    def ids(tokenizer) -> torch.Tensor:
        length = tokenizer.model_max_length
        return tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    second = getattr(pipeline, "tokenizer_2", None)
    return ids(pipeline.tokenizer) if second is None else torch.stack([ids(pipeline.tokenizer), ids(second)], 1)
