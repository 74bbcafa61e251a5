"""Batches of distillation: latents, noise, timesteps and captions (notebook 03)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.training import KDTraining
from ..core.losses import Batch
from ..models.devices import to_device
from .rng import BatchRng


def random_conditioning_probability(timesteps: torch.Tensor, num_train_timesteps: int, rate: float) -> torch.Tensor:
    """Probability that a caption is replaced by an unrelated one (arXiv 2504.02011): e^(-λ min(t/T, 1 - t/T)).

    High at both ends: near pure noise an image determines nothing of its caption, near the clean one the caption adds
    nothing to the image. The teacher predicts for any caption, so the student sees far more captions than images.
    """
    share = timesteps / num_train_timesteps
    return torch.exp(-rate * torch.minimum(share, 1 - share))


@dataclass
class KDBatches:
    """Batches of a data set: called with a step's `BatchRng`, it gives latents, noise, timesteps and token ids.

    Args:
        data: a `LatentDataset` or `StreamedDataset`.
        device: where the batches are used.
        caption_dropout: probability of the empty caption instead of the image's.
        random_conditioning: λ of `random_conditioning_probability`; 0 keeps every caption with its image.
        noise_offset: strength of a shift common to all pixels of a channel, added to the noise.

    What is off draws no random number, so it changes no other.
    """

    data: object
    num_train_timesteps: int
    device: torch.device | str = "cpu"
    caption_dropout: float = 0.0
    random_conditioning: float = 0.0
    noise_offset: float = 0.0

    @classmethod
    def of(cls, config: KDTraining, data, num_train_timesteps: int, device: torch.device) -> KDBatches:
        """Batches as the parameters of notebook 03 describe them."""
        chosen = (config.caption_dropout, config.random_conditioning, config.noise_offset)
        return cls(data, num_train_timesteps, device, *chosen)

    @property
    def num_examples(self) -> int | None:
        """Size of the data set; None for a stream."""
        return self.data.num_examples

    def __call__(self, rng: BatchRng) -> Batch:
        """One micro-batch."""
        latents, token_ids = self.data.batch(rng)
        noise = rng.normal(*latents.shape[1:])
        timesteps = rng.integers(self.num_train_timesteps)
        if self.noise_offset:
            noise = noise + self.noise_offset * rng.normal(noise.shape[1], 1, 1)
        if self.random_conditioning:
            probability = random_conditioning_probability(timesteps, self.num_train_timesteps, self.random_conditioning)
            others, replaced = self.data.other_token_ids(rng), rng.uniform() < probability
            token_ids = _where(replaced, others, token_ids)
        if self.caption_dropout:
            token_ids = _where(rng.uniform() < self.caption_dropout, self.data.empty_ids, token_ids)
        return Batch(*(to_device(tensor, self.device) for tensor in (latents, noise, timesteps, token_ids)))


def _where(condition: torch.Tensor, ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.where(condition.view(-1, *[1] * (others.ndim - 1)), ids, others)
