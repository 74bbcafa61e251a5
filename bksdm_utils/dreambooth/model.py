"""What DreamBooth trains: whole networks, or low-rank adapters in them (LoRA, arXiv 2106.09685; notebook 05)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..config.dreambooth import DreamBoothTraining
from ..models.hashes import architecture_hash
from ..models.lora import LORA_BASE
from ..models.saving import save_model


class DreamBoothModel(nn.Module):
    """U-Net and text encoder of a pipeline as one model, so that both are trained and saved together.

    The networks are the pipeline's own: it samples with what has been learned so far.

    Args:
        config: for one method, as `config.for_method` gives it: "full" trains all weights of the U-Net, "lora"
            adapters in it, W x + (alpha / rank) B A x; with `train_text_encoder` the same in the text encoder.

    Raises:
        ValueError: an SDXL pipeline, or LoRA targets that name no layer.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, config: DreamBoothTraining):
        super().__init__()
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise ValueError(f"DreamBooth is not written for a {type(pipeline).__name__}: expected SD-v1 or SD-v2")
        (self.method,) = config.methods
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self.base = architecture_hash(pipeline.unet)
        for part in (self.unet, self.text_encoder, pipeline.vae):
            part.requires_grad_(False)
        if self.method == "full":
            self.unet.requires_grad_(True)
            self.text_encoder.requires_grad_(bool(config.train_text_encoder))
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            _add_adapters(self.unet, config.lora_rank, config.lora_alpha, config.lora_targets)
            if config.train_text_encoder:
                text = config.lora_text_rank, config.lora_text_alpha, config.lora_text_targets
                _add_adapters(self.text_encoder, *text)

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w), (B,), (B, T) -> the U-Net's prediction, (B, 4, h, w)."""
        hidden_states = self.text_encoder(token_ids)[0]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=hidden_states).sample

    @property
    def num_trained(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save(self, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        """Full: a whole pipeline. LoRA: what `pipe.load_lora_weights(folder)` takes, with alphas and base model."""
        if self.method == "full":
            save_model(pipeline, folder)
            return
        options = {}
        for name, part in (("unet", self.unet), ("text_encoder", self.text_encoder)):
            if getattr(part, "peft_config", None):
                options[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
                options[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, **options)
        file = folder / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as written:
            metadata = {**written.metadata(), LORA_BASE: self.base}
        save_file(load_file(file), file, metadata=metadata)


def _add_adapters(part: nn.Module, rank: int, alpha: float, targets: tuple[str, ...]) -> None:
    layers = [name for name, layer in part.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):  # PEFT ignores such a target
            raise ValueError(f"no layer of the {type(part).__name__} is called {target}: expected ends of names such "
                             f"as {layers[-1]}")  # fmt: skip
    part.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), "default")
