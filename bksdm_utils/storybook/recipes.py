"""The recipe of the storybook teacher: its world, and how long each stage trains (notebook 00)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config.training import Training
from ..data.scenes import World

_TRAINING = {"lr_schedule": "cosine", "ema_decay": 0.99, "checkpoint_steps": 200}
_AUTOENCODER = {**_TRAINING, "batch_size": 16, "lr_warmup_steps": 50, "weight_decay": 0.0}
_CLIP = {**_TRAINING, "learning_rate": 1.5e-3, "lr_warmup_steps": 100, "weight_decay": 0.05, "adam_beta2": 0.98}
CONFIGS = {
    "vae": Training(**_AUTOENCODER, max_train_steps=3_000, learning_rate=2e-3),
    "text": Training(**_CLIP, max_train_steps=800, batch_size=192).but(checkpoint_steps=100),
    "clip": Training(**_CLIP, max_train_steps=5_000, batch_size=64).but(checkpoint_steps=100),
    "unet": Training(**_TRAINING, max_train_steps=20_000, batch_size=16, learning_rate=1e-3, lr_decay_start=0.4,
                     lr_warmup_steps=100, weight_decay=0.0).but(ema_decay=0.998),
    "decoder": Training(**_AUTOENCODER, max_train_steps=1_600, learning_rate=1e-3),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a storybook teacher is made.

    Attributes:
        configs: of each stage in their order; "text" trains CLIP's text tower, "clip" then its vision tower.
        world: of the images.
        unet_pair_share: share of pairs among the U-Net's scenes, which are hardest for it.
        num_scenes: rendered for training.
        start: a diffusers pipeline's folder, whose U-Net is trained on with the new text encoder; None: random weights.
    """

    configs: Mapping[str, Training] = field(default_factory=lambda: CONFIGS)
    world: World = World(pair_share=0.5)
    unet_pair_share: float = 0.65
    num_scenes: int = 48_000
    start: Path | None = None


RECIPE = Recipe()
