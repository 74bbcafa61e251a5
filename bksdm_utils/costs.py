"""What a network costs: parameters, multiply-accumulates in two stated conventions, latency.

`macs` follows the paper (thop's convention): convolutions and linear layers, and 4 x numel for each LayerNorm; the
matrix products inside attention are left out. `macs_with_attention` counts every convolution and matrix product.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .surgery import empty_unet


@dataclass(frozen=True)
class Costs:
    """Costs of one forward pass of batch 1.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates in the paper's convention.
        macs_with_attention: the same, matrix products of attention included, normalisations left out.
        by_block: (params, macs) for each top-level block, "down_blocks.0" and so on.
    """

    params: int
    macs: int
    macs_with_attention: int
    by_block: dict[str, tuple[int, int]]


def unet_inputs(config: Mapping, sample_size: int | None = None, batch_size: int = 1, device="meta") -> tuple:
    """(noisy latents, timesteps, encoder_hidden_states) of the right shapes, zeros; 77 text tokens."""
    side = sample_size or config["sample_size"]
    width = config["cross_attention_dim"]
    width = width[0] if isinstance(width, (list, tuple)) else width
    return (
        torch.zeros(batch_size, config["in_channels"], side, side, device=device),
        torch.zeros(batch_size, dtype=torch.long, device=device),
        torch.zeros(batch_size, 77, width, device=device),
    )


def count(unet: UNet2DConditionModel | Mapping, sample_size: int | None = None) -> Costs:
    """Counts a U-Net or U-Net config on the meta device, without memory or time.

    Args:
        sample_size: side of the latents in pixels; the config's own by default (64 is a picture of 512 for SD-v1).
    """
    unet = empty_unet(unet.config if isinstance(unet, nn.Module) else unet)
    macs, handles = defaultdict(int), []
    for name, module in unet.named_modules():
        handles.append(module.register_forward_hook(_counter(macs, block_of(name))))
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        unet(*unet_inputs(unet.config, sample_size))
    for handle in handles:
        handle.remove()
    params = defaultdict(int)
    for name, parameter in unet.named_parameters():
        params[block_of(name)] += parameter.numel()
    by_block = {block: (number, macs[block]) for block, number in params.items()}
    return Costs(sum(params.values()), sum(macs.values()), flops.get_total_flops() // 2, by_block)


def block_of(name: str) -> str:
    """The top-level block that a parameter or module belongs to: "up_blocks.1", "mid_block", "conv_in" …"""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]


def _counter(macs: dict[str, int], block: str):
    def hook(module: nn.Module, _, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            macs[block] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs[block] += output.numel() * module.in_features
        elif isinstance(module, nn.LayerNorm):
            macs[block] += 4 * output.numel()

    return hook


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass: median and the quartiles around it."""

    median: float
    low: float
    high: float


def interleaved_latency(unets: Mapping[str, nn.Module], repeats: int = 10, batch_size: int = 1) -> dict[str, Latency]:
    """Times several U-Nets in turn, A B A B …, so that a machine's drift falls on all of them alike."""
    seconds = defaultdict(list)
    for round_ in range(repeats + 1):
        for name, unet in unets.items():
            elapsed = _forward_seconds(unet, batch_size)
            if round_:  # the first is a warm-up
                seconds[name].append(elapsed)
    return {name: Latency(statistics.median(s), *_quartiles(s)) for name, s in seconds.items()}


@torch.no_grad()
def _forward_seconds(unet: nn.Module, batch_size: int) -> float:
    inputs = unet_inputs(unet.config, batch_size=batch_size, device=unet.device)
    inputs = [x.to(unet.dtype) if x.is_floating_point() else x for x in inputs]
    started = time.perf_counter()
    unet(*inputs)
    if unet.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
