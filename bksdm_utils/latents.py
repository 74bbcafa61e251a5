"""Training data as the U-Net sees it: latents and token ids, computed once and kept on disk, or made from a stream.

Both kinds of data answer `batch(draw)`; what they give depends on (seed, step, position in the global batch) only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .data import Example, Skipped, captions_of, in_threads, load_examples, open_image, open_table, to_pixels
from .engine import Draw, shared_work
from .presets import ROOT, Preset
from .run import check_disk

SHARD_SIZE = 1024  # examples in one file of the cache: 134 MB at 512 pixels with both flips
SHUFFLE_BUFFER = 1000  # rows among which a stream is shuffled


def load_data(
    preset: Preset, pipeline: DiffusionPipeline, cache_dir: str | Path | None = None, seed: int = 0
) -> LatentDataset | StreamedDataset:
    """The preset's training data: from the cache, or where it is streamed as it comes, in an order of `seed`."""
    return StreamedDataset(preset, pipeline, seed) if preset.streaming else load_latents(preset, pipeline, cache_dir)


# --- the cache --------------------------------------------------------------------------------------------------------


class LatentDataset:
    """Latents and token ids of a data set; the latents stay on disk, mapped into memory.

    Attributes:
        captions: the first caption of each of the N pictures.
        token_ids: of all M >= N captions, (M, T); SDXL's two tokenizers give (M, 2, T).
        empty_ids: (1, T), or (1, 2, T), of the empty caption.
        skipped: (name, reason) of every picture set aside.
        key: the cache's, a hash of everything the latents depend on.
        shape: of one picture's latents, (4, h, w).
    """

    def __init__(self, shards: Sequence[Path], examples: Sequence[Example], skipped: Skipped, empty_ids, key: str):
        self._files = [safe_open(path, "pt") for path in shards]
        self.skipped = skipped + [tuple(s) for f in self._files for s in json.loads(f.metadata()["failed"])]
        index = torch.cat([f.get_tensor("index") for f in self._files])
        if not len(index):
            raise ValueError(f"none of {len(examples)} pictures could be read (first: {self.skipped[:1]})")
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
        """Mean and standard deviation of the VAE's posterior, scaled, (B, 4, h, w); side 1 is the mirrored picture."""
        pairs = zip(indices, sides, strict=True)
        places = [(int(np.searchsorted(self._starts, i, "right")) - 1, i, side) for i, side in pairs]

        def found(name: str) -> torch.Tensor:
            slices = [self._files[s].get_slice(name)[i - int(self._starts[s]), side] for s, i, side in places]
            return torch.stack([moment.float() for moment in slices])

        return found("mean"), found("std")

    def batch(self, draw: Draw, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 4, h, w) sampled from the posterior, and token ids (B, T) or (B, 2, T)."""
        mean, std = self.moments(draw.indices, draw.integers(self._sides).tolist())
        latents = mean + std * draw.normal(*self.shape)
        return latents.to(device), self.token_ids[self._chosen_captions(draw)].to(device)

    def _chosen_captions(self, draw: Draw) -> torch.Tensor:
        chosen = draw.choose(self._num_captions[draw.indices].tolist())
        return self._first_caption[draw.indices] + torch.tensor(chosen)

    def other_token_ids(self, draw: Draw) -> torch.Tensor:
        """Token ids of captions chosen from all, whatever their pictures."""
        return self.token_ids[draw.integers(len(self.token_ids))]


def load_latents(preset: Preset, pipeline: DiffusionPipeline, cache_dir: str | Path | None = None) -> LatentDataset:
    """The preset's training data as latents; what the cache lacks is computed, shard by shard.

    The cache's key is a hash of every picture and caption, the VAE's weights, the tokenizers, resolution and mirroring;
    for a table, of what `datasets` knows it by instead of its pictures: for files their place and time of change.
    A build that was killed goes on with the shards that are missing; several processes share them.

    Raises:
        ValueError: no usable data, or too little disk for the cache.
        OSError: a shard could not be written; those before it are kept.
    """
    examples, skipped = load_examples(preset)
    key = _cache_key(examples, preset, pipeline)
    folder = Path(cache_dir or ROOT / "outputs" / "cache") / f"latents-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"{number:05}.safetensors" for number in range(-(-len(examples) // SHARD_SIZE))]
    missing = sum(not _readable(path) for path in shards)
    check_disk(folder, cache_bytes(preset, pipeline, missing * SHARD_SIZE), "the cache of latents")
    for number in shared_work(len(shards), pipeline.device):
        chosen = range(number * SHARD_SIZE, min(len(examples), (number + 1) * SHARD_SIZE))
        if not _readable(shards[number]):
            _write_shard(shards[number], encode(examples, chosen, preset, pipeline), f"{number + 1}/{len(shards)}")
    for part in folder.glob("*.part*") if missing else ():
        if time.time() - part.stat().st_mtime > 3600:  # of builds that were killed, not of one beside this
            part.unlink(missing_ok=True)
    return LatentDataset(shards, examples, skipped, token_ids(pipeline, [""]), key)


def cache_bytes(preset: Preset, pipeline: DiffusionPipeline, num_examples: int) -> int:
    """Bytes of the cached latents: fp16 mean and standard deviation, for both flips where pictures may be mirrored."""
    side = preset.resolution // pipeline.vae_scale_factor
    return num_examples * (1 + preset.flip) * 2 * 2 * pipeline.vae.config.latent_channels * side**2


def _readable(path: Path) -> bool:
    try:
        safe_open(path, "pt")
    except (FileNotFoundError, SafetensorError):  # not there, or cut off
        return False
    return True


def _cache_key(examples: Sequence[Example], preset: Preset, pipeline: DiffusionPipeline) -> str:
    about = f"2-{preset.resolution}-centre-{preset.flip}-{pipeline.vae.config.scaling_factor}-{SHARD_SIZE}"
    digest = hashlib.sha256(about.encode())
    for example in examples:
        digest.update("\x00".join((example.key, *example.captions)).encode())
    for tokenizer in _tokenizers(pipeline):
        vocabulary = sorted(tokenizer.get_vocab().items())
        digest.update(f"{tokenizer.model_max_length}{vocabulary}".encode())
    for tensor in pipeline.vae.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(examples: Sequence[Example], chosen: range, preset: Preset, pipeline: DiffusionPipeline) -> dict:
    """One shard: scaled moments of the VAE's posterior in fp16, mean and std (n, F, 4, h, w), F 2 with mirrored
    pictures; `index` of the examples used (n,); `token_ids` of their captions; `failed`, (name, reason) of the others.
    """
    sides, failed = 1 + preset.flip, []
    size = preset.resolution // pipeline.vae_scale_factor
    moments = [torch.zeros(0, sides, 2, pipeline.vae.config.latent_channels, size, size)]
    index: list[int] = []
    opened = _opened(examples, chosen, preset.resolution, failed)
    for batch in _batches(opened, encoding_batch(preset.resolution)):
        index += [i for i, _ in batch]
        pixels = torch.stack([pixels for _, pixels in batch])
        flipped = [pixels, pixels.flip(-1)][:sides]
        moments.append(torch.stack([torch.stack(posterior(pipeline, side), 1) for side in flipped], 1).cpu())
    mean, std = torch.cat(moments).half().unbind(2)
    captions = [caption for i in index for caption in examples[i].captions]
    ids = token_ids(pipeline, captions or [""])[: len(captions)].int()
    return {"mean": mean.contiguous(), "std": std.contiguous(), "index": torch.tensor(index, dtype=torch.int64),
            "token_ids": ids, "failed": failed}  # fmt: skip


def encoding_batch(resolution: int) -> int:
    """Pictures that the VAE encodes at once: a few GB of activations."""
    return min(32, max(1, 4 * 512**2 // resolution**2))


def posterior(pipeline: DiffusionPipeline, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (B, 4, h, w) of pictures (B, 3, H, W) in the VAE's scaled latents, fp32."""
    vae = pipeline.vae
    found, factor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist, vae.config.scaling_factor
    return found.mean.float() * factor, found.std.float() * factor


def _opened(examples, chosen: range, resolution: int, failed: Skipped) -> Iterator[tuple[int, torch.Tensor]]:
    def opened(i: int):
        try:
            return i, to_pixels(examples[i].open(), resolution), None
        except Exception as error:  # PIL raises many kinds for a broken file; each sets that one picture aside
            return i, None, f"unreadable picture: {error}"

    for i, pixels, reason in in_threads(opened, chosen):
        if pixels is not None:
            yield i, pixels
        else:
            failed.append((examples[i].name, reason))


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_shard(path: Path, encoded: Mapping, turn: str) -> None:
    tensors, part = dict(encoded), path.with_suffix(f".part{os.getpid()}")
    failed = json.dumps(tensors.pop("failed"))
    try:
        save_file(tensors, part, metadata={"failed": failed})
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(
            errno.ENOSPC, f"the latents of shard {turn} could not be written ({error}); those before it are kept. Is "
            f"the disk full? Make room and run again", str(path),
        ) from error  # fmt: skip
    os.replace(part, path)


def _tokenizers(pipeline: DiffusionPipeline) -> list:
    named = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [tokenizer for tokenizer in named if tokenizer is not None]


def token_ids(pipeline: DiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Captions as the pipeline's text encoder takes them, (N, T); for SDXL's two text encoders (N, 2, T)."""
    ids = [
        tokenizer(list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                  return_tensors="pt").input_ids
        for tokenizer in _tokenizers(pipeline)
    ]  # fmt: skip
    return ids[0] if len(ids) == 1 else torch.stack(ids, 1)


# --- streams ----------------------------------------------------------------------------------------------------------


class StreamedDataset:
    """Shards or a hub data set read as they come: nothing is kept on disk, the VAE encodes every batch.

    Row number `step * global batch + position` of the shuffled, endlessly repeated stream belongs to that place of that
    step, so resumption and the number of processes change nothing; a resumption reads up to its step again, and every
    process reads all rows but decodes its own. A place whose row is unusable takes the next usable one of the same
    global batch.

    Attributes:
        empty_ids, skipped, key, shape: as in `LatentDataset`.
        num_examples: None, nobody knows.
    """

    num_examples = None

    def __init__(self, preset: Preset, pipeline: DiffusionPipeline, seed: int = 0):
        self.preset, self.pipeline, self.seed = preset, pipeline, seed
        self.empty_ids, self.skipped, self._known = token_ids(pipeline, [""]), [], set()
        self.key = (f"{preset.train_data_dir} {preset.image_column} {preset.caption_column} {preset.resolution} "
                    f"{preset.flip}")  # fmt: skip
        side = preset.resolution // pipeline.vae_scale_factor
        self.shape = (pipeline.vae.config.latent_channels, side, side)
        self._table = open_table(preset, streaming=True)
        self._reader = ThreadPoolExecutor(1)  # reads one global batch ahead
        self._stream, self._place, self._ahead, self._now = None, 0, None, (-1, [])

    def batch(self, draw: Draw, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 4, h, w) sampled from the posterior, and token ids (B, T) or (B, 2, T)."""
        rows = self._global_batch(draw.step, draw.global_batch_size)
        found = list(in_threads(lambda position: self._usable(rows, position), draw.positions))
        sides = draw.integers(1 + self.preset.flip).tolist()
        pixels = torch.stack([p.flip(-1) if side else p for (p, _), side in zip(found, sides, strict=True)])
        with torch.no_grad():
            parts = [posterior(self.pipeline, part) for part in pixels.split(encoding_batch(self.preset.resolution))]
        mean, std = (torch.cat(moments) for moments in zip(*parts, strict=True))
        latents = mean.to(device) + std.to(device) * draw.normal(*self.shape).to(device)
        chosen = draw.choose([len(captions) for _, captions in found])
        texts = [captions[i] for (_, captions), i in zip(found, chosen, strict=True)]
        return latents, token_ids(self.pipeline, texts).to(device)

    def other_token_ids(self, draw: Draw) -> torch.Tensor:
        """Token ids of captions chosen from those of the global batch, whatever their pictures."""
        rows = self._global_batch(draw.step, draw.global_batch_size)
        found = [self._captions(rows, i) for i in draw.integers(len(rows)).tolist()]
        chosen = draw.choose([len(captions) for captions in found])
        return token_ids(self.pipeline, [captions[i] for captions, i in zip(found, chosen, strict=True)])

    def _captions(self, rows: Sequence[Mapping], position: int) -> tuple[str, ...]:
        for offset in range(len(rows)):
            try:
                return captions_of(rows[(position + offset) % len(rows)][self.preset.caption_column])
            except ValueError:  # `_usable` reports it
                continue
        return ("",)

    def _usable(self, rows: Sequence[Mapping], position: int) -> tuple[torch.Tensor, tuple[str, ...]]:
        for offset in range(len(rows)):
            row = rows[(position + offset) % len(rows)]
            try:
                captions = captions_of(row[self.preset.caption_column])
                return to_pixels(open_image(row[self.preset.image_column]), self.preset.resolution), captions
            except Exception as error:  # an unreadable picture, of whatever kind
                self._set_aside((row[self.preset.image_column] or {}).get("path") or row["row"], str(error))
        raise ValueError(f"{self.preset.train_data_dir}: none of {len(rows)} rows is usable ({self.skipped[-1]})")

    def _set_aside(self, name: str, reason: str) -> None:
        if (name, reason) not in self._known:  # once, however many epochs come by it
            self._known.add((name, reason))
            self.skipped.append((name, reason))
            print(f"set aside: {name}: {reason}", flush=True)

    def _global_batch(self, step: int, size: int) -> list[Mapping]:
        """The rows of one optimizer step; the next step's are read meanwhile."""
        if self._now[0] != step:
            if self._ahead is None or self._ahead[0] != step:
                self._ahead = (step, self._reader.submit(self._read, step, size))
            self._now = (step, self._ahead[1].result())
            self._ahead = (step + 1, self._reader.submit(self._read, step + 1, size))
        return self._now[1]

    def _read(self, step: int, size: int) -> list[Mapping]:
        if self._stream is None or step * size < self._place:
            self._stream, self._place = self._rows(), 0
        wanted = range(step * size - self._place + size)
        read = (next(self._stream) for _ in tqdm(wanted, "reading up to here", disable=len(wanted) < 10 * size))
        self._place += len(wanted)
        return list(deque(read, maxlen=size))  # a resumption passes over very many

    def _rows(self) -> Iterator[Mapping]:
        """All rows, epoch after epoch, shards and rows shuffled by (seed, epoch); a broken shard is set aside."""
        epoch = 0
        while True:
            chance, count = np.random.default_rng((self.seed, epoch)), 0
            for row in _shuffled(self._one_epoch(chance.permutation(self._table.num_shards)), chance):
                yield {**row, "row": f"epoch {epoch}, row {count}"}
                count += 1
            if not count:
                raise ValueError(f"{self.preset.train_data_dir} has no rows to read ({self.skipped[-1:]})")
            epoch += 1

    def _one_epoch(self, shards: Sequence[int]) -> Iterator[Mapping]:
        for shard in shards:
            try:
                yield from self._table.shard(self._table.num_shards, int(shard))
            except OSError:  # the network or the disk: the rows that did not come would be missed by this process alone
                raise
            except Exception as error:  # cut off, or not what its name says; its rows up to there were good
                self._set_aside(f"shard {shard}", f"{type(error).__name__}: {error}")


def _shuffled(rows: Iterator, chance: np.random.Generator) -> Iterator:
    buffer = []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        place = int(chance.integers(SHUFFLE_BUFFER))
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[i] for i in chance.permutation(len(buffer)))
