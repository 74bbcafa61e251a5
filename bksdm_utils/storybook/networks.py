"""The networks of the storybook teacher and what each minimises (notebook 00)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torchvision.transforms.functional import gaussian_blur
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPOutput

from ..core.losses import min_snr_weights
from ..data.scenes import ATTRIBUTES, COLOURS, OBJECTS, PLACES, RELATIONS, SIZE, SIZES, Scene

MAX_TOKENS = 20  # the longest caption has 15, start and end included
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LATENT_CHANNELS, LATENT_SIZE = 4, SIZE // 4
SIDES = (None, *RELATIONS)
ATTRIBUTE_VALUES = {"size": SIZES, "colour": COLOURS, "object": OBJECTS}
LAYOUT_CLASSES = [1 + len(values) for _ in SIDES for values in ATTRIBUTE_VALUES.values()] + [len(PLACES)]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD-v1's


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to floats in -1 … 1, as the VAE takes them."""
    return images.float() / 127.5 - 1


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Floats in -1 … 1 to uint8 images on the CPU."""
    return ((images.cpu() + 1) * 127.5).round().to(torch.uint8)


def degraded(images: torch.Tensor, decoded: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """Of a batch a third as rendered, a third as the autoencoder decodes it, a third blurred.

    Args:
        images, decoded: (B, 3, H, W) uint8.
        kind: (B,) in [0, 1), which chooses.
    """
    kind, sharp = kind.view(-1, 1, 1, 1), images.float()
    blurred = gaussian_blur(sharp, 5, 0.3 + 0.7 * kind[0].item())
    return torch.where(kind < 1 / 3, sharp, torch.where(kind < 2 / 3, decoded.float(), blurred))


def to_clip(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to CLIP's normalised floats; 64 x 64 is CLIP's own size here, so nothing is resized."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images.float() / 255 - mean) / std


def new_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt from `captions`; any text can be written with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pairs.pre_tokenizer = pre_tokenizers.Whitespace()
    pairs.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(pairs.to_str())["model"]["merges"]]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def new_clip(tokenizer: CLIPTokenizer, size: int = SIZE) -> CLIPModel:
    """0.8 M parameters: text 96 wide and 3 deep, vision 96 wide and 4 deep over 8 x 8 patches of size/8 pixels."""
    width = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "projection_dim": 64}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**width, **special, "pad_token_id": tokenizer.pad_token_id, "num_hidden_layers": 3}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    vision = {**width, "num_hidden_layers": 4, "image_size": size, "patch_size": size // 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def new_vae() -> AutoencoderKL:
    """0.7 M parameters, 64 x 64 x 3 to 16 x 16 x 4."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8,
        latent_channels=LATENT_CHANNELS, sample_size=SIZE,
    )  # fmt: skip


def new_unet(latent_size: int = LATENT_SIZE, channels: Sequence[int] = (32, 64, 64)) -> UNet2DConditionModel:
    """SD-v1's block types, so that every line of surgery is the same: cross attention in all but the last stage.

    2.2 M parameters with the channels given.
    """
    attentions = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=latent_size, block_out_channels=channels, layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * attentions + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attentions,
        cross_attention_dim=96, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


@torch.no_grad()
def translate_text(unet: UNet2DConditionModel, old: torch.Tensor, new: torch.Tensor) -> None:
    """Fits a U-Net's cross attention to another text encoder, by least squares.

    Args:
        old, new: (N, MAX_TOKENS, 96), hidden states of the same texts by its own text encoder and by the other.
    """
    to_old = torch.linalg.lstsq(new.flatten(0, 1), old.flatten(0, 1)).solution  # (96, 96): new @ to_old is nearly old
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight.copy_(module.weight @ to_old.T)


class LayoutHead(torch.nn.Module):
    """A CLIP and, for its training only, a linear head that reads a scene's layout from a tower's hidden states."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        self.head = torch.nn.Linear(clip.config.text_config.hidden_size, sum(LAYOUT_CLASSES))

    def loss(self, states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy against `layout_classes`, (N, 16), -100 being ignored.

        Args:
            states: (N, 96), or (N, 16, 96) with a state of its own for each class.
        """
        logits = self.head(states).split(LAYOUT_CLASSES, dim=-1)
        if states.dim() == 3:
            logits = [part[:, i] for i, part in enumerate(logits)]
        parts = zip(logits, classes.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(*part, reduction="sum") for part in parts]).mean() / len(states)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the CLIP without the head."""
        self.clip.save_pretrained(folder)


def layout_classes(scene: Scene) -> list[int]:
    """Size, colour and object, 0 for none, of the middle and of the four sides of an image, then its place: 16."""
    things = [scene.layout.get(side) for side in SIDES]
    numbers = [1 + list(values).index(getattr(thing, name)) if thing else 0
               for thing in things for name, values in ATTRIBUTE_VALUES.items()]  # fmt: skip
    return [*numbers, PLACES.index(scene.place)]


def layout_tokens(scene: Scene, tokenizer: CLIPTokenizer) -> tuple[list[int], list[list[int]]]:
    """Where a causal text tower can first tell a part of the layout: three token positions, and what it can tell there.

    A relation's last token knows the first thing and its side, the second thing's last token both things, the
    caption's end all. Without the first two the tower learns which things there are but not, in 2,000 steps, which is
    where: that is an exclusive or of a thing's order and the relation.
    """
    parts = [f"{scene.things[0]} {scene.relation}", scene.caption.removesuffix(f" {scene.place}"), scene.caption]
    known = [replace(scene, things=scene.things[:1]), scene, scene]
    ends = [len(tokenizer(part).input_ids) - 2 for part in parts]
    ends[2] += 1  # the end token
    classes = [layout_classes(part) for part in known]
    for part in classes[:2]:
        part[-1] = -100  # the place comes later
    return (ends, classes) if scene.relation else (ends[2:] * 3, classes[2:] * 3)


def text_layout_loss(
    model: LayoutHead, token_ids: torch.Tensor, ends: torch.Tensor, classes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the text tower tells of layouts; token_ids (B, T), ends (B, 3) and classes (B, 3, 16) of `layout_tokens`."""
    states = model.clip.text_model(token_ids).last_hidden_state
    states = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))  # (B, 3, 96)
    first, second, end = (model.loss(states[:, i], classes[:, i]) for i in range(3))
    return {"loss": first + second + end, "first": first, "second": second, "end": end}


def _edges(images: torch.Tensor) -> torch.Tensor:
    """Horizontal and vertical differences, flattened per image."""
    return torch.cat([images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)], dim=1)


def vae_loss(vae: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """L1 + L2 + edges + a small KL; images (B, 3, 64, 64) in -1 … 1, noise (B, 4, 16, 16)."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    l2 = F.mse_loss(decoded, images)
    edge = F.l1_loss(_edges(decoded), _edges(images))
    kl = posterior.kl().mean() / noise[0].numel()
    loss = F.l1_loss(decoded, images) + 2 * l2 + edge + 1e-4 * kl
    return {"loss": loss, "psnr": 10 * torch.log10(4 / l2), "kl": kl}


def detail_weight(images: torch.Tensor) -> torch.Tensor:
    """Weights of mean 1 that stress pixels unlike their surroundings, (B, 1, H, W): small things on wide skies."""
    contrast = (images - F.avg_pool2d(images, 15, 1, 7, count_include_pad=False)).abs().mean(1, keepdim=True)
    weight = 0.1 + F.avg_pool2d(contrast, 3, 1, 1)
    return weight / weight.mean((1, 2, 3), keepdim=True)


def decoder_loss(vae: torch.nn.Module, latents: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """L1 + L2 stressed by `detail_weight`, + edges; latents as the VAE takes them, images in -1 … 1."""
    decoded = vae.decode(latents).sample
    error, weight = (decoded - images).abs(), detail_weight(images)
    loss = (weight * (error + 2 * error.square())).mean() + F.l1_loss(_edges(decoded), _edges(images))
    return {"loss": loss, "psnr": 10 * torch.log10(4 / error.square().mean())}


def hard_negatives(scene: Scene, rng: random.Random) -> list[Scene]:
    """Scenes a word away: two with another object, which is hardest to see, one more change, two other layouts."""
    changes = [_another_value(scene, kind, rng) for kind in ("object", "object", rng.choice(ATTRIBUTES))]
    return [*changes, _another_layout(scene, rng), _another_layout(scene, rng)]


def _another_value(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """`scene` with another value of `attribute`, of its second thing as often as of its first."""
    mirrored = replace(scene, things=scene.things[::-1])
    source = mirrored if attribute != "place" and rng.random() < 0.5 else scene
    other = rng.choice([s for s in source.alternatives(attribute) if s != source])
    return other if source is scene else replace(other, things=other.things[::-1])


def _another_layout(scene: Scene, rng: random.Random) -> Scene:
    """The colours swapped or the relation changed; another colour where there is but one thing."""
    if scene.relation is None:
        return _another_value(scene, "colour", rng)
    first, second = scene.things
    if first.colour != second.colour and rng.random() < 0.5:
        return replace(scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))
    return _another_value(scene, "relation", rng)


def clip_loss(
    model: LayoutHead, images: torch.Tensor, token_ids: torch.Tensor, meaning: torch.Tensor, classes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`contrast`, and the layout predicted from the vision tower's first token and, a layer earlier, from its patches.

    The patches bind a thing's attributes to each other before the last layer gathers them: as `layout_tokens` in texts.

    Args:
        images: (B, 3, H, W), as `to_clip` gives them.
        token_ids: (B·K, MAX_TOKENS), the first B are the true captions in the order of the images.
        meaning: (B·K,), see `contrast`.
        classes: (B, 16), `layout_classes` of the images.
    """
    output = model.clip(input_ids=token_ids, pixel_values=images, output_hidden_states=True)
    losses, vision = contrast(output, meaning), output.vision_model_output
    whole, parts = map(model.clip.vision_model.post_layernorm, (vision.last_hidden_state, vision.hidden_states[-2]))
    losses |= {"layout": model.loss(whole[:, 0], classes), "patches": model.loss(side_states(parts), classes)}
    return {**losses, "loss": losses["loss"] + losses["layout"] + losses["patches"]}


def side_states(states: torch.Tensor) -> torch.Tensor:
    """For each of `layout_classes` the mean state of the 4 x 4 patches around its side, for the place the first token.

    Args:
        states: (B, 65, 96), the first token and 8 x 8 patches.

    Returns:
        (B, 16, 96).
    """
    patches, steps = states[:, 1:].unflatten(1, (8, 8)), [RELATIONS.get(side, (0, 0)) for side in SIDES]
    sides = [patches[:, 2 + 2 * dy : 6 + 2 * dy, 2 + 2 * dx : 6 + 2 * dx].mean((1, 2)) for dx, dy in steps]
    return torch.stack([*(side for side in sides for _ in ATTRIBUTE_VALUES), states[:, 0]], dim=1)


def contrast(output: CLIPOutput, meaning: torch.Tensor) -> dict[str, torch.Tensor]:
    """CLIP's symmetric contrast, the captions of the batch joined by hard negatives.

    Args:
        meaning: (B·K,) one number per distinct caption; a text that equals another's true caption is no negative to it.
    """
    logits = output.logits_per_image  # (B, B·K)
    size, target = len(logits), torch.arange(len(logits), device=logits.device)
    same = meaning[None] == meaning[:size, None]
    same[target, target] = False
    logits = logits.masked_fill(same, -1e4)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :size].T, target)) / 2
    return {"loss": loss, "accuracy": (logits.argmax(1) == target).float().mean()}


def high_noise_timesteps(uniform: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Uniform numbers to timesteps with a larger share of the noisy ones, where an image's content is decided."""
    return (uniform ** (1 / 1.3) * num_timesteps).long().clamp(max=num_timesteps - 1)


def unet_loss(
    unet: torch.nn.Module, latents: torch.Tensor, noise: torch.Tensor, uniform: torch.Tensor,
    hidden_states: torch.Tensor, scheduler: DDPMScheduler,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Min-SNR weighted ε-prediction (γ = 5, arXiv 2303.09556).

    Args:
        latents, noise: (B, 4, 16, 16).
        uniform: (B,) in [0, 1), to choose the timesteps by.
        hidden_states: (B, MAX_TOKENS, 96).
    """
    timesteps = high_noise_timesteps(uniform, scheduler.config.num_train_timesteps)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy_latents, timesteps, hidden_states).sample
    error = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
    return {"loss": (min_snr_weights(scheduler, timesteps, 5.0) * error).mean(), "mse": error.mean()}
