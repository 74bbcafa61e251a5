"""Parameters and multiply-accumulates in two stated conventions (notebook 01).

`macs` follows the paper (thop's convention): convolutions and linear layers, and 4 x numel for each LayerNorm; the
matrix products inside attention are left out. `macs_with_attention` counts every convolution and matrix product, and
leaves normalisations out. Both are of batch 1 and one forward pass; guidance doubles them, steps multiply them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..config.shared import Teacher
from ..core.copying import empty_unet
from ..core.families import text_encoder_names, unet_inputs
from ..models.configs import teacher_config


class ModuleCosts(NamedTuple):
    """Costs of one module with everything inside it."""

    params: int
    macs: int
    macs_with_attention: int


@dataclass(frozen=True)
class Costs:
    """Costs of one forward pass of batch 1.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates in the paper's convention.
        macs_with_attention: the same, matrix products of attention included, normalisations left out.
        by_module: the same three for every module by its name, each with everything inside it.
    """

    params: int
    macs: int
    macs_with_attention: int
    by_module: dict[str, ModuleCosts]

    @property
    def by_block(self) -> dict[str, ModuleCosts]:
        """The part of `by_module` that adds up to the whole: stages ("down_blocks.0" …), mid block, ends."""
        return {name: costs for name, costs in self.by_module.items() if is_block(name) and costs.params}


def count(unet: UNet2DConditionModel | Mapping, sample_size: int | None = None) -> Costs:
    """Counts a U-Net or U-Net config on the meta device, without memory or time.

    Args:
        sample_size: side of the latents in pixels; the config's own by default (64 is an image of 512 for SD-v1).
    """
    unet = empty_unet(unet.config if isinstance(unet, nn.Module) else unet)
    return _count(unet, **unet_inputs(unet.config, sample_size))


def count_vae(config: Mapping, resolution: int) -> dict[str, Costs]:
    """Counts a VAE's decoder and encoder by its config.

    Args:
        resolution: side of the image in pixels.
    """
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    side = resolution // 2 ** (len(config["block_out_channels"]) - 1)
    latents = torch.zeros(1, config["latent_channels"], side, side, device="meta")
    pixels = torch.zeros(1, config["in_channels"], resolution, resolution, device="meta")
    return {"VAE decoder": _count(vae.decoder, latents), "VAE encoder": _count(vae.encoder, pixels)}


def count_text_encoder(config: Mapping, num_tokens: int | None = None) -> Costs:
    """Counts a CLIP text encoder by its config, for texts of `num_tokens`, by default as many as it can take."""
    import transformers

    model_class = getattr(transformers, config.get("architectures", ["CLIPTextModel"])[0])
    text = transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    text._attn_implementation = "eager"  # plain matrix products, which are counted
    with torch.device("meta"):
        model = model_class(text)
    tokens = torch.zeros(1, num_tokens or text.max_position_embeddings, dtype=torch.long, device="meta")
    return _count(model, tokens)


def count_pipeline(config: Teacher) -> dict[str, Costs]:
    """Counts everything that makes an image at the preset's resolution: text encoder(s), U-Net, VAE."""
    unet, vae = teacher_config(config), teacher_config(config, "vae")
    resolution = config.chosen_preset.common["resolution"]
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    parts = {name.replace("_", " "): count_text_encoder(teacher_config(config, name))
             for name in text_encoder_names(unet)}  # fmt: skip
    return parts | {"U-Net": count(unet, side), **count_vae(vae, resolution)}


def _count(model: nn.Module, *inputs: torch.Tensor, **named: object) -> Costs:
    macs, handles = Counter(), []
    for name, module in model.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(_counter(macs, _containers(name))))
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(*inputs, **named)
    for handle in handles:
        handle.remove()
    params = Counter()
    for name, parameter in model.named_parameters():
        params.update(dict.fromkeys(_containers(name), parameter.numel()))
    counted = flops.get_flop_counts()
    exact = {name: sum(counted.get(f"{type(model).__name__}.{name}".rstrip("."), {}).values()) // 2
             for name, _ in model.named_modules()}  # fmt: skip
    by_module = {name: ModuleCosts(params[name], macs[name], exact[name]) for name in exact}
    whole = by_module.pop("")
    return Costs(*whole, by_module)


def _containers(name: str) -> list[str]:
    """A module's name and those of all modules around it, the model's own "" included."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def block_of(name: str) -> str:
    """The top-level block that a parameter or module belongs to: "up_blocks.1", "mid_block", "conv_in" …"""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]


def is_block(name: str) -> bool:
    """Whether a module is one of the top-level blocks."""
    return name == block_of(name) and name not in ("", "down_blocks", "up_blocks")


def _counter(macs: Counter, names: Sequence[str]):
    def hook(module: nn.Module, _, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            done = output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            done = output.numel() * module.in_features
        elif isinstance(module, nn.LayerNorm):
            done = 4 * output.numel()
        else:
            return
        macs.update(dict.fromkeys(names, done))

    return hook


# Parameters in millions as their authors give them: (U-Net, the whole pipeline without the VAE's encoder). BK-SDM's are
# rounded up to ten million (its model card), KOALA's to one (arXiv 2312.04005).
PUBLISHED: dict[str, dict[str, tuple[int, int | None]]] = {
    "sd-v1": {"teacher": (860, 1040), "bk_base": (580, 760), "bk_small": (490, 660), "bk_tiny": (330, 500)},
    "sd-v2-base": {"teacher": (870, 1260), "bk_base": (590, 980), "bk_small": (490, 880), "bk_tiny": (330, 720)},
    "sdxl": {"teacher": (2567, None), "koala_1b": (1161, None), "koala_700m": (782, None)},
}


def beside_published(params: Mapping[str, int], published: Mapping[str, int]) -> list[dict]:
    """Rows of a table: network, ours, published and the difference, all in millions of parameters."""
    rows = []
    for name, exact in params.items():
        row = {"network": name, "ours (M)": round(exact / 1e6, 2), "published (M)": None, "difference (M)": None}
        if published.get(name) is not None:
            row |= {"published (M)": published[name], "difference (M)": round(exact / 1e6 - published[name], 2)}
        rows.append(row)
    return rows
