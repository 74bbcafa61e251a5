"""Recipes of storybook teachers: the world, the networks' sizes and how long each stage trains (notebook 00)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config.training import Training
from ..data.scenes import WORLD, World

_TRAINING = {"lr_schedule": "cosine", "ema_decay": 0.99, "checkpoint_steps": 200}
_AUTOENCODER = {**_TRAINING, "batch_size": 16, "lr_warmup_steps": 50, "weight_decay": 0.0}
_UNET = {**_TRAINING, "learning_rate": 1e-3, "weight_decay": 0.0, "lr_warmup_steps": 100, "lr_decay_start": 0.4}
CONFIGS = {
    "vae": Training(**_AUTOENCODER, max_train_steps=3_000, learning_rate=2e-3),
    "clip": Training(**_TRAINING, max_train_steps=2_300, batch_size=96, learning_rate=2e-3, lr_warmup_steps=100,
                     weight_decay=0.05, adam_beta2=0.98).but(checkpoint_steps=100),
    "unet": Training(**_TRAINING, max_train_steps=9_000, batch_size=32, learning_rate=1e-3, lr_decay_start=0.3,
                     lr_warmup_steps=200).but(ema_decay=0.999),
    "decoder": Training(**_AUTOENCODER, max_train_steps=1_600, learning_rate=1e-3),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How one storybook teacher is made.

    Attributes:
        configs: of each stage in their order. "text" trains CLIP's text tower, "clip" then only the vision tower;
            "unet_64" trains the U-Net on renders of 64 pixels, "unet" goes on from it.
        world: of the images.
        unet_pair_share: share of pairs among the U-Net's scenes, which are hardest for it; None is the world's.
        num_scenes: rendered for training.
        channels: of the U-Net's stages, outermost first.
        layouts: hard negatives with another layout for each image of the CLIP's training.
        start: a diffusers pipeline's folder, whose U-Net is trained on with the new text encoder; None: random weights.
    """

    configs: Mapping[str, Training]
    world: World = WORLD
    unet_pair_share: float | None = None
    num_scenes: int = 48_000
    channels: tuple[int, ...] = (32, 64, 128, 128)
    start: Path | None = None
    layouts: int = 1


_THREE_STAGES = {
    "vae": CONFIGS["vae"],
    "text": CONFIGS["clip"].but(max_train_steps=800, batch_size=192, learning_rate=1.5e-3),
    "clip": CONFIGS["clip"].but(max_train_steps=2_500, batch_size=64, learning_rate=1.5e-3),
    "unet": Training(**_UNET, max_train_steps=7_000, batch_size=16).but(ema_decay=0.995),
    "decoder": CONFIGS["decoder"],
}  # fmt: skip
_SHARED = {"num_scenes": 16_000, "channels": (32, 64, 64), "layouts": 2, "unet_pair_share": 0.75}
RECIPES = {
    "four_stages": Recipe(CONFIGS),
    "three_stages": Recipe(_THREE_STAGES, World(64, 0.5), **_SHARED),
    "three_stages_96": Recipe({
        **{stage: _THREE_STAGES[stage] for stage in ("vae", "text", "clip")},
        "unet_64": _THREE_STAGES["unet"],
        "unet": _THREE_STAGES["unet"].but(max_train_steps=4_000),
        "decoder": CONFIGS["decoder"].but(max_train_steps=400),
    }, World(96, 0.5), **_SHARED),
}  # fmt: skip
RECIPE = RECIPES["four_stages"]  # the committed teacher's
