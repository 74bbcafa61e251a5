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
        macs: multiply-accumulates in the paper's convention.
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
    """Counts a VAE's decoder and encoder by its config, for images of `resolution` pixels a side."""
    vae = empty_vae(config)
    side = resolution // 2 ** (len(config["block_out_channels"]) - 1)
    latents = torch.zeros(1, config["latent_channels"], side, side, device="meta")
    pixels = torch.zeros(1, config["in_channels"], resolution, resolution, device="meta")
    return {"VAE decoder": _count(vae.decoder, latents), "VAE encoder": _count(vae.encoder, pixels)}


def count_text_encoder(config: Mapping) -> Costs:
    """Counts a CLIP text encoder by its config, for texts of as many tokens as it can take."""
    model = empty_text_encoder(config)
    return _count(model, torch.zeros(1, model.config.max_position_embeddings, dtype=torch.long, device="meta"))


def empty_vae(config: Mapping) -> AutoencoderKL:
    """The autoencoder of a config on the meta device."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def empty_text_encoder(config: Mapping) -> nn.Module:
    """The CLIP text encoder of a config on the meta device."""
    import transformers

    model_class = getattr(transformers, config.get("architectures", ["CLIPTextModel"])[0])
    text = transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    text._attn_implementation = "eager"  # plain matrix products, which are counted
    with torch.device("meta"):
        return model_class(text)


def count_pipeline(config: Teacher) -> dict[str, Costs]:
    """Counts everything that makes an image at the preset's resolution: text encoder(s), U-Net, VAE."""
    unet, vae = teacher_config(config), teacher_config(config, "vae")
    resolution = config.chosen_preset.common["resolution"]
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    parts = {name.replace("_", " "): count_text_encoder(teacher_config(config, name))
             for name in text_encoder_names(unet)}  # fmt: skip
    return parts | {"U-Net": count(unet, side), **count_vae(vae, resolution)}


def _count(model: nn.Module, *inputs: torch.Tensor, **named: object) -> Costs:
    macs, params, handles = Counter(), Counter(), []

    def add(module: nn.Module, output: torch.Tensor, names: Sequence[str]) -> None:
        each = 4 if isinstance(module, nn.LayerNorm) else module.weight[0].numel()
        macs.update(dict.fromkeys(names, each * output.numel()))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.LayerNorm)):
            names = _containers(name)
            handles.append(module.register_forward_hook(lambda module, _, out, names=names: add(module, out, names)))
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(*inputs, **named)
    for handle in handles:
        handle.remove()
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


def is_block(name: str) -> bool:
    """Whether a module is one of the top-level blocks: "up_blocks.1", "mid_block", "conv_in" …"""
    stage, *inner = name.split(".")
    return name != "" and len(inner) == (1 if stage in ("down_blocks", "up_blocks") else 0)


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
        ours, theirs = exact / 1e6, published.get(name)
        row = {"network": name, "ours (M)": round(ours, 2), "published (M)": theirs}
        rows.append({**row, "difference (M)": None if theirs is None else round(ours - theirs, 2)})
    return rows
