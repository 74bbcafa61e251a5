"""The latent cache: training data encoded once and kept on disk (notebook 03)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config.training import TrainingData
from ..data.examples import Example, Skipped
from ..data.images import to_pixels
from ..data.sources import load_examples
from ..files import ROOT, check_disk, in_threads
from ..models.devices import memory_advice
from .encoding import crop_centres, encoding_batch, posterior, token_ids, tokenizers
from .rng import BatchRng
from .step import shared_work
from .streams import StreamedDataset

SHARD_SIZE = 1024  # examples in one file of the cache: 134 MB at 512 pixels with both flips


def load_data(config: TrainingData, pipeline: DiffusionPipeline, seed: int = 0) -> LatentDataset | StreamedDataset:
    """The training data: from the latent cache, or streamed, then in an order of `seed`."""
    return StreamedDataset(config, pipeline, seed) if config.streaming else load_latents(config, pipeline)


class LatentDataset:
    """Latents and token ids of a data set; the latents stay on disk, mapped into memory.

    Attributes:
        captions: the first caption of each of the N images.
        token_ids: of all M >= N captions, (M, T); SDXL's two tokenizers give (M, 2, T).
        empty_ids: (1, T), or (1, 2, T), of the empty caption.
        skipped: (name, reason) of every image set aside.
        key: the cache's, a hash of everything the latents depend on.
        shape: of one image's latents, (4, h, w).
    """

    def __init__(self, shards: Sequence[Path], examples: Sequence[Example], skipped: Skipped, empty_ids, key: str):
        self._files = [safe_open(path, "pt") for path in shards]
        self.skipped = skipped + [tuple(s) for f in self._files for s in json.loads(f.metadata()["failed"])]
        index = torch.cat([f.get_tensor("index") for f in self._files])
        if not len(index):
            raise ValueError(f"none of {len(examples)} images could be read (first: {self.skipped[:1]})")
        self.captions = [examples[i].captions[0] for i in index.tolist()]
        self.token_ids = torch.cat([f.get_tensor("token_ids") for f in self._files]).long()
        self.empty_ids, self.key = empty_ids, key
        self._num_captions = torch.tensor([len(examples[i].captions) for i in index.tolist()])
        self._first_caption = self._num_captions.cumsum(0) - self._num_captions
        counts = [len(f.get_tensor("index")) for f in self._files]
        self._starts = np.cumsum([0, *counts])
        self._sides, *shape = self._files[int(np.argmax(counts))].get_slice("mean").get_shape()[1:]
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def num_examples(self) -> int:
        return len(self)

    def moments(self, indices: Sequence[int], sides: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's posterior, scaled, (B, 4, h, w), of one view of each image.

        Views are numbered crop by crop, the mirrored one, if any, after the plain one.
        """
        shards = [int(np.searchsorted(self._starts, i, "right")) - 1 for i in indices]
        rows = [(self._files[shard], i - int(self._starts[shard]), side)
                for shard, i, side in zip(shards, indices, sides, strict=True)]  # fmt: skip
        mean, std = (torch.stack([file.get_slice(name)[i, side].float() for file, i, side in rows])
                     for name in ("mean", "std"))  # fmt: skip
        return mean, std

    def batch(self, rng: BatchRng) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 4, h, w) sampled from the posterior, and token ids (B, T) or (B, 2, T), on the CPU."""
        mean, std = self.moments(rng.indices, rng.integers(self._sides).tolist())
        latents = mean + std * rng.normal(*self.shape)
        chosen = torch.tensor(rng.choose(self._num_captions[rng.indices].tolist()))
        return latents, self.token_ids[self._first_caption[rng.indices] + chosen]

    def other_token_ids(self, rng: BatchRng) -> torch.Tensor:
        """Token ids of captions chosen from all, whatever their images."""
        return self.token_ids[rng.integers(len(self.token_ids))]


def load_latents(config: TrainingData, pipeline: DiffusionPipeline) -> LatentDataset:
    """The preset's training data as latents; what is missing in the cache is computed, shard by shard.

    The cache's key is a hash of every image and caption, the VAE's weights, the tokenizers, resolution, crop and
    mirroring; for a table, of `datasets`' fingerprint instead of its images: for files their path and time of change.
    A build that was killed continues with the missing shards; several processes share them.

    Raises:
        ValueError: no usable data, or too little disk for the cache.
        OSError: a shard could not be written; those before it are kept.
    """
    examples, skipped = load_examples(config)
    examples = examples[: config.max_train_samples]
    key = _cache_key(examples, config, pipeline)
    folder = Path(config.cache_dir or ROOT / "outputs" / "cache") / f"latents-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"{number:05}.safetensors" for number in range(-(-len(examples) // SHARD_SIZE))]
    missing = sum(not _readable(path) for path in shards)
    check_disk(folder, cache_bytes(config, pipeline, missing * SHARD_SIZE), "the cache of latents")
    for number in shared_work(len(shards), pipeline.device):
        chosen = range(number * SHARD_SIZE, min(len(examples), (number + 1) * SHARD_SIZE))
        if not _readable(shards[number]):
            with memory_advice("encoding the training images", "a lower resolution", "nothing else on this GPU"):
                encoded = encode(examples, chosen, config, pipeline)
            _write_shard(shards[number], encoded, f"{number + 1}/{len(shards)}")
    for part in folder.glob("*.part*") if missing else ():
        if time.time() - part.stat().st_mtime > 3600:  # of builds that were killed, not of one beside this
            part.unlink(missing_ok=True)
    return LatentDataset(shards, examples, skipped, token_ids(pipeline, [""]), key)


def cache_bytes(config: TrainingData, pipeline: DiffusionPipeline, num_examples: int) -> int:
    """Bytes of the cached latents: fp16 mean and standard deviation of every crop, both flips with mirroring."""
    side = config.resolution // pipeline.vae_scale_factor
    return num_examples * config.num_views * 2 * 2 * pipeline.vae.config.latent_channels * side**2


def _readable(path: Path) -> bool:
    try:
        safe_open(path, "pt")
    except (FileNotFoundError, SafetensorError):  # missing, or cut off
        return False
    return True


def _cache_key(examples: Sequence[Example], config: TrainingData, pipeline: DiffusionPipeline) -> str:
    facts = f"2-{config.resolution}-{config.crop_key}-{config.flip}-{pipeline.vae.config.scaling_factor}-{SHARD_SIZE}"
    digest = hashlib.sha256(facts.encode())
    for example in examples:
        digest.update("\x00".join((example.key, *example.captions)).encode())
    for tokenizer in tokenizers(pipeline):
        vocabulary = sorted(tokenizer.get_vocab().items())
        digest.update(f"{tokenizer.model_max_length}{vocabulary}".encode())
    for tensor in pipeline.vae.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(examples: Sequence[Example], chosen: range, config: TrainingData, pipeline: DiffusionPipeline) -> dict:
    """One shard: scaled moments of the VAE's posterior in fp16, mean and std (n, F, 4, h, w) of the F views of each
    image; `index` of the examples used (n,); `token_ids` of their captions; `failed`, (name, reason) of the others.
    """
    failed, size = [], config.resolution // pipeline.vae_scale_factor
    moments = [torch.zeros(0, config.num_views, 2, pipeline.vae.config.latent_channels, size, size)]
    index: list[int] = []
    opened = _opened(examples, chosen, config, failed)
    while batch := list(islice(opened, encoding_batch(config.resolution))):
        index += [i for i, _ in batch]
        crops = torch.stack([crops for _, crops in batch]).unbind(1)
        views = [view for crop in crops for view in (crop, crop.flip(-1))[: 1 + config.flip]]
        moments.append(torch.stack([torch.stack(posterior(pipeline, view), 1) for view in views], 1).cpu())
    mean, std = torch.cat(moments).half().unbind(2)
    captions = [caption for i in index for caption in examples[i].captions]
    ids = token_ids(pipeline, captions or [""])[: len(captions)].int()
    return {"mean": mean.contiguous(), "std": std.contiguous(), "index": torch.tensor(index, dtype=torch.int64),
            "token_ids": ids, "failed": failed}  # fmt: skip


def _opened(examples, chosen: range, config: TrainingData, failed: Skipped) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, crops (C, 3, H, W)) of the readable images; the others are appended to `failed`."""

    def opened(i: int):
        try:
            image, centres = examples[i].open(), crop_centres(examples[i].key, config.random_crops)
            crops = [to_pixels(image, config.resolution, centre, config.interpolation) for centre in centres]
            return i, torch.stack(crops), None
        except Exception as error:  # PIL raises many kinds for a broken file; each sets that one image aside
            return i, None, f"unreadable image: {error}"

    for i, pixels, reason in in_threads(opened, chosen):
        if pixels is not None:
            yield i, pixels
        else:
            failed.append((examples[i].name, reason))


def _write_shard(path: Path, encoded: Mapping, turn: str) -> None:
    tensors, part = dict(encoded), path.with_suffix(f".part{os.getpid()}")
    failed = json.dumps(tensors.pop("failed"))
    try:
        save_file(tensors, part, metadata={"failed": failed})
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, f"the latents of shard {turn} could not be written ({error}); those before it are "
                      "kept. Is the disk full? Make room and run again", str(path)) from error  # fmt: skip
    os.replace(part, path)
