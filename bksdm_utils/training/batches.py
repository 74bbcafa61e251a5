"""What a training step is given: noise, timesteps and captions, augmented."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Augmentation:
    """What a training step does to captions and noise beyond the paper; all off by default.

    Attributes:
        caption_dropout: probability of the empty caption instead of the picture's.
        random_conditioning: λ of `random_conditioning_probability`; 0 keeps every caption with its picture.
        noise_offset: strength of a shift common to all pixels of a channel, added to the noise.
    """

    caption_dropout: float = 0.0
    random_conditioning: float = 0.0
    noise_offset: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0 or (name == "caption_dropout" and value > 1):
                raise ValueError(f"{name} is {value}: expected zero or more, a probability at most 1")


def random_conditioning_probability(timesteps: torch.Tensor, num_train_timesteps: int, rate: float) -> torch.Tensor:
    """Probability that a caption is replaced by an unrelated one (arXiv 2504.02011): e^(-λ min(t/T, 1 - t/T)).

    High at both ends: near pure noise a picture says nothing about its caption, near the clean one the caption adds
    nothing to the picture. The teacher answers for any caption, so the student sees far more of them than pictures.
    """
    share = timesteps / num_train_timesteps
    return torch.exp(-rate * torch.minimum(share, 1 - share))


def _where(chosen: torch.Tensor, ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    chosen = chosen.view(-1, *[1] * (others.ndim - 1)).to(others.device)
    return torch.where(chosen, ids.to(others.device), others)
