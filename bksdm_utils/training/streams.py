"""Training data read as it comes, without a cache (notebook 03)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ..config.training import TrainingData
from ..data.examples import captions_of
from ..data.images import open_image, to_pixels
from ..data.shards import open_table
from ..files import in_threads
from ..models.devices import to_device
from .encoding import encoding_batch, posterior, token_ids
from .rng import BatchRng

SHUFFLE_BUFFER = 1000  # rows among which a stream is shuffled


class StreamedDataset:
    """Shards or a hub data set read as they come: nothing is kept on disk, the VAE encodes every batch.

    Row number `step * global batch + position` of the shuffled, endlessly repeated stream belongs to that position of
    that step, so resumption and the number of processes change nothing; a resumption reads up to its step again, and
    every process reads all rows but decodes its own. A position whose row is unusable takes the next usable one of the
    same global batch.

    Attributes:
        empty_ids, skipped, key, shape: as in `LatentDataset`.
        num_examples: None, unknown.
    """

    num_examples = None

    def __init__(self, config: TrainingData, pipeline: DiffusionPipeline, seed: int = 0):
        self.config, self.pipeline, self.seed = config, pipeline, seed
        self.empty_ids, self.skipped, self._known = token_ids(pipeline, [""]), [], set()
        self.key = (f"{config.train_data_dir} {config.image_column} {config.caption_column} {config.resolution} "
                    f"{config.flip}" + f" {config.crop_key}" * (config.crop_key != "centre"))  # fmt: skip
        side = config.resolution // pipeline.vae_scale_factor
        self.shape = (pipeline.vae.config.latent_channels, side, side)
        self._table = open_table(config, streaming=True)
        self._reader = ThreadPoolExecutor(1)  # reads one global batch ahead
        self._stream, self._position, self._ahead, self._now = None, 0, None, (-1, [])

    def batch(self, rng: BatchRng) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 4, h, w) sampled from the posterior, on the VAE's device, and token ids (B, T) or (B, 2, T)."""
        rows = self._global_batch(rng.step, rng.global_batch_size)
        centres = [(0.5, 0.5)] * len(rng.positions)
        if self.config.random_crops:
            centres = list(zip(*(rng.uniform().tolist() for _ in "xy"), strict=True))
        opened = list(in_threads(lambda item: self._usable(rows, *item), zip(rng.positions, centres, strict=True)))
        sides = rng.integers(1 + self.config.flip).tolist()
        pixels = torch.stack([p.flip(-1) if side else p for (p, _), side in zip(opened, sides, strict=True)])
        with torch.no_grad():
            parts = [posterior(self.pipeline, part) for part in pixels.split(encoding_batch(self.config.resolution))]
        mean, std = (torch.cat(moments) for moments in zip(*parts, strict=True))
        latents = mean + std * to_device(rng.normal(*self.shape), mean.device)
        chosen = rng.choose([len(captions) for _, captions in opened])
        texts = [captions[i] for (_, captions), i in zip(opened, chosen, strict=True)]
        return latents, token_ids(self.pipeline, texts)

    def other_token_ids(self, rng: BatchRng) -> torch.Tensor:
        """Token ids of captions chosen from those of the global batch, whatever their images."""
        rows = self._global_batch(rng.step, rng.global_batch_size)
        opened = [self._captions(rows, i) for i in rng.integers(len(rows)).tolist()]
        chosen = rng.choose([len(captions) for captions in opened])
        return token_ids(self.pipeline, [captions[i] for captions, i in zip(opened, chosen, strict=True)])

    def _captions(self, rows: Sequence[Mapping], position: int) -> tuple[str, ...]:
        for offset in range(len(rows)):
            try:
                return captions_of(rows[(position + offset) % len(rows)]["text"])
            except ValueError:  # `_usable` reports it
                continue
        return ("",)

    def _usable(
        self, rows: Sequence[Mapping], position: int, centre: tuple[float, float]
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        for offset in range(len(rows)):
            row = rows[(position + offset) % len(rows)]
            try:
                captions = captions_of(row["text"])
                image, config = open_image(row["image"]), self.config
                return to_pixels(image, config.resolution, centre, config.interpolation), captions
            except Exception as error:  # an unreadable image, of whatever kind
                self._set_aside((row["image"] or {}).get("path") or row["row"], str(error))
        raise ValueError(f"{self.config.train_data_dir}: none of {len(rows)} rows is usable ({self.skipped[-1]})")

    def _set_aside(self, name: str, reason: str) -> None:
        if (name, reason) not in self._known:  # once, in however many epochs
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
        if self._stream is None or step * size < self._position:
            self._stream, self._position = self._rows(), 0
        wanted = range(step * size - self._position + size)
        read = (next(self._stream) for _ in tqdm(wanted, "reading up to here", disable=len(wanted) < 10 * size))
        self._position += len(wanted)
        return list(deque(read, maxlen=size))  # a resumption passes over very many

    def _rows(self) -> Iterator[Mapping]:
        """All rows, epoch after epoch, shards and rows shuffled by (seed, epoch); a broken shard is set aside."""
        epoch = 0
        while True:
            order_rng, count = np.random.default_rng((self.seed, epoch)), 0
            for row in _shuffled(self._one_epoch(order_rng.permutation(self._table.num_shards)), order_rng):
                yield {**row, "row": f"epoch {epoch}, row {count}"}
                count += 1
            if not count:
                raise ValueError(f"{self.config.train_data_dir} has no rows to read ({self.skipped[-1:]})")
            epoch += 1

    def _one_epoch(self, shards: Sequence[int]) -> Iterator[Mapping]:
        for shard in shards:
            try:
                yield from self._table.shard(self._table.num_shards, int(shard))
            except OSError:  # the network or the disk: only this process would lack its rows
                raise
            except Exception as error:  # cut off, or not what its name says; its rows up to there were good
                self._set_aside(f"shard {shard}", f"{type(error).__name__}: {error}")


def _shuffled(rows: Iterator, order_rng: np.random.Generator) -> Iterator:
    buffer = []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        slot = int(order_rng.integers(SHUFFLE_BUFFER))
        yield buffer[slot]
        buffer[slot] = row
    yield from (buffer[i] for i in order_rng.permutation(len(buffer)))
