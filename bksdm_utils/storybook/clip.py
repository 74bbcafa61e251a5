"""The training of the storybook teacher's CLIP: its text tower, then its vision tower (notebook 00)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from ..config.training import Training
from ..data.scenes import Scene
from ..training.rng import BatchRng
from . import networks
from .networks import to_bytes, to_unit
from .recipes import RECIPE, Recipe
from .stages import Batches, reconstruction, rendered_images, scenes, train


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
    """Trains the vision tower to the finished text tower, and saves both with the tokenizer.

    A third of the images passes the autoencoder and a third is blurred: sampled images are never as sharp as renders,
    and a CLIP that saw nothing else takes blurred cats for hearts.
    """
    num_scenes = min(num_scenes, 16_000)
    world, images = scenes(num_scenes, world=recipe.world), rendered_images(range(num_scenes), world=recipe.world)
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").to(device).eval()
    decoded = torch.cat([to_bytes(reconstruction(vae, to_unit(part).to(device))) for part in images.split(256)])
    torch.manual_seed(config.seed)
    model, tokenizer = _initial(output_dir / "text")
    tokenizer.save_pretrained(output_dir / "clip")

    def batch(rng: BatchRng) -> tuple:
        chosen, kind = [world[i] for i in rng.indices], rng.uniform()
        pixels = networks.degraded(images[rng.indices], decoded[rng.indices], kind)
        classes = torch.tensor([networks.layout_classes(scene) for scene in chosen])
        parts = networks.to_clip(pixels), *_captions(chosen, tokenizer, rng), classes
        return tuple(part.to(device) for part in parts)

    train(model.to(device), config, output_dir / "clip", networks.clip_loss, Batches(num_scenes, batch))


def _initial(text: Path) -> tuple[networks.LayoutHead, CLIPTokenizer]:
    """A CLIP whose text tower is that of the stage "text" and stays so; and its tokenizer."""
    clip = CLIPModel.from_pretrained(text, torch_dtype=torch.float32)
    clip.text_model.requires_grad_(False)
    return networks.LayoutHead(clip), CLIPTokenizer.from_pretrained(text)


def _captions(chosen: Sequence[Scene], tokenizer: CLIPTokenizer, rng: BatchRng) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, (B·K, T), of the scenes' captions and of their hard negatives', and a number per distinct caption."""
    changes = random.Random(f"{rng.seed}-{rng.step}-{rng.positions.start}")
    negatives = zip(*(networks.hard_negatives(scene, changes) for scene in chosen), strict=True)
    captions = [scene.caption for group in (chosen, *negatives) for scene in group]
    numbers = {caption: number for number, caption in enumerate(captions)}
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    return tokens, torch.tensor([numbers[caption] for caption in captions])
