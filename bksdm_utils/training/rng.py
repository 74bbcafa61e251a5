"""The random choices of a training step, functions of (seed, optimizer step, position in the global batch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


@dataclass
class BatchRng:
    """One micro-batch's random choices: which examples, and a generator of its own for each of them.

    Attributes:
        indices: the examples, one epoch being a permutation of all `num_examples`; a stream, whose length is None, has
            an order of its own instead.
        generators: CPU generators seeded by (seed, step, position in the global batch).
    """

    seed: int
    step: int
    positions: range
    global_batch_size: int
    num_examples: int | None

    @cached_property
    def indices(self) -> list[int]:
        positions = [self.step * self.global_batch_size + p for p in self.positions]
        epochs = [divmod(position, self.num_examples) for position in positions]
        return [int(_shuffled(self.seed, epoch, self.num_examples)[i]) for epoch, i in epochs]

    @cached_property
    def generators(self) -> list[torch.Generator]:
        states = [np.random.SeedSequence((self.seed, self.step, p)).generate_state(2) for p in self.positions]
        return [torch.Generator().manual_seed(int(a) << 32 | int(b)) for a, b in states]

    @property
    def batch_seed(self) -> int:
        """One seed for the whole micro-batch, of what has no generator for each example, such as dropout."""
        return int(np.random.SeedSequence((self.seed, self.step, self.positions.start, 1)).generate_state(1)[0])

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values, (batch, *shape), on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def integers(self, high: int) -> torch.Tensor:
        """Integers below `high`, (batch,)."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self.generators])

    def uniform(self) -> torch.Tensor:
        """Values in [0, 1), (batch,)."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])

    def choose(self, counts: Sequence[int]) -> list[int]:
        """An integer below each of `counts`, (batch,); where that is 1, no random number is spent."""
        pairs = zip(counts, self.generators, strict=True)
        return [int(torch.randint(int(n), (1,), generator=g)) if n > 1 else 0 for n, g in pairs]
