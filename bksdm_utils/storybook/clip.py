"""The training of the storybook teacher's CLIP: its text tower, its vision tower, or both together (notebook 00)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer

from ..config.training import Training
from ..data.scenes import Scene
from ..training.rng import BatchRng
from . import networks
from .recipes import RECIPE, Recipe
from .stages import Batches, rendered_images, scenes, train


def train_text(
    output_dir: Path, config: Training, num_scenes: int, device: str = "cpu", recipe: Recipe = RECIPE
) -> None:
    """Trains a CLIP's text tower alone to tell what stands where, and saves it with its tokenizer."""
    world = scenes(num_scenes, world=recipe.world)
    captions = [scene.caption for scene in world]
    tokenizer = networks.new_tokenizer(captions)
    tokenizer.save_pretrained(output_dir / "text")
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    supervision = zip(*(networks.layout_tokens(scene, tokenizer) for scene in world), strict=True)
    ends, classes = map(torch.tensor, supervision)
    torch.manual_seed(config.seed)
    model = networks.LayoutHead(networks.new_clip(tokenizer, recipe.world.size)).to(device)

    def batch(rng: BatchRng) -> tuple:
        return tuple(part[rng.indices].to(device) for part in (tokens, ends, classes))

    train(model, config, output_dir / "text", networks.text_layout_loss, Batches(num_scenes, batch))


def train_clip(
    output_dir: Path, config: Training, num_scenes: int, device: str = "cpu", recipe: Recipe = RECIPE
) -> None:
    """Trains both towers, or vision alone where a text tower is trained already; saves them and the tokenizer."""
    world, images = scenes(num_scenes, world=recipe.world), rendered_images(range(num_scenes), world=recipe.world)
    torch.manual_seed(config.seed)
    model, tokenizer = _initial(output_dir, world, recipe)
    tokenizer.save_pretrained(output_dir / "clip")
    locked = isinstance(model, networks.LayoutHead)

    def batch(rng: BatchRng) -> tuple:
        chosen = [world[i] for i in rng.indices]
        parts = [networks.to_clip(images[rng.indices]), *_captions(chosen, tokenizer, rng, recipe.layouts)]
        if locked:
            parts.append(torch.tensor([networks.layout_classes(scene) for scene in chosen]))
        return tuple(part.to(device) for part in parts)

    loss = networks.layout_clip_loss if locked else networks.clip_loss
    train(model.to(device), config, output_dir / "clip", loss, Batches(num_scenes, batch))


def _initial(output_dir: Path, world: Sequence[Scene], recipe: Recipe) -> tuple[torch.nn.Module, CLIPTokenizer]:
    """A CLIP of random weights, or one whose text tower is that of the stage "text" and stays so; and its tokenizer."""
    if "text" not in recipe.configs:
        tokenizer = networks.new_tokenizer([scene.caption for scene in world])
        return networks.new_clip(tokenizer, recipe.world.size), tokenizer
    clip = CLIPModel.from_pretrained(output_dir / "text", torch_dtype=torch.float32)
    clip.text_model.requires_grad_(False)
    return networks.LayoutHead(clip), CLIPTokenizer.from_pretrained(output_dir / "text")


def _captions(
    chosen: Sequence[Scene], tokenizer: CLIPTokenizer, rng: BatchRng, layouts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, (B·K, T), of the scenes' captions and of their hard negatives', and a number per distinct caption."""
    changes = random.Random(f"{rng.seed}-{rng.step}-{rng.positions.start}")
    negatives = zip(*(networks.hard_negatives(scene, changes, layouts) for scene in chosen), strict=True)
    captions = [scene.caption for group in (chosen, *negatives) for scene in group]
    numbers = {caption: number for number, caption in enumerate(captions)}
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    return tokens, torch.tensor([numbers[caption] for caption in captions])
