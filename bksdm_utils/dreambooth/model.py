"""What DreamBooth trains: whole networks or low-rank adapters (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..models.hashes import architecture_hash
from ..models.lora import LORA_BASE
from ..models.saving import save_model

METHODS = ("full", "lora")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: W x becomes W x + (alpha / rank) B A x.

    The defaults are BK-SDM's. Attributes of the text encoder are ignored where it is not trained.
    """

    rank: int = 16
    alpha: float = 27
    targets: tuple[str, ...] = ("to_q", "to_v")
    text_rank: int = 16
    text_alpha: float = 17
    text_targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        for name in ("rank", "alpha", "text_rank", "text_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"lora {name} is {getattr(self, name)}: expected a positive number")
        if not self.targets or not self.text_targets:
            raise ValueError("lora has no targets: expected names of linear layers, such as to_q, to_v")


class DreamBoothModel(nn.Module):
    """The U-Net and text encoder of a pipeline as one model, so that both are trained, averaged and saved together.

    The networks are the pipeline's own: what is learned, the pipeline draws.

    Args:
        method: "full" trains all weights of the U-Net, "lora" adapters in it.
        train_text_encoder: the same in the text encoder.
        seed: of the adapters' first weights.

    Raises:
        ValueError: an unknown method, an SDXL pipeline, or adapters' targets that name no layer.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, method: str = "full", train_text_encoder: bool = True,
        lora: Lora | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise ValueError(f"DreamBooth is not written for a {type(pipeline).__name__}: expected SD-v1 or SD-v2")
        self.unet, self.text_encoder, self.method = pipeline.unet, pipeline.text_encoder, method
        self.lora = (lora or Lora()) if method == "lora" else None
        self.base = architecture_hash(pipeline.unet)
        for part in (self.unet, self.text_encoder, pipeline.vae):
            part.requires_grad_(False)
        if self.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._adapt(train_text_encoder)
        else:
            self.unet.requires_grad_(True)
            self.text_encoder.requires_grad_(train_text_encoder)

    def _adapt(self, train_text_encoder: bool) -> None:
        wanted = [(self.unet, LoraConfig(r=self.lora.rank, lora_alpha=self.lora.alpha,
                                         target_modules=list(self.lora.targets)))]  # fmt: skip
        if train_text_encoder:
            wanted.append((self.text_encoder, LoraConfig(r=self.lora.text_rank, lora_alpha=self.lora.text_alpha,
                                                         target_modules=list(self.lora.text_targets))))  # fmt: skip
        for part, config in wanted:
            layers = [name for name, layer in part.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
            for target in sorted(config.target_modules):
                if not any(f".{name}".endswith(f".{target}") for name in layers):  # PEFT passes over it in silence
                    raise ValueError(f"no layer of the {type(part).__name__} is called {target}: expected ends of "
                                     f"names such as {layers[-1]}")  # fmt: skip
            part.add_adapter(config, "default")

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w), (B,), (B, T) -> the U-Net's prediction, (B, 4, h, w)."""
        told = self.text_encoder(token_ids)[0]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=told).sample

    @property
    def num_trained(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save(self, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        """What plain diffusers loads: full, a whole pipeline; lora, what `pipe.load_lora_weights(folder)` takes, with
        its alphas."""
        if self.lora is None:
            save_model(pipeline, folder)
            return
        told = {}
        for name, part in (("unet", self.unet), ("text_encoder", self.text_encoder)):
            if getattr(part, "peft_config", None):
                told[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
                told[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, **told)
        file = folder / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as written:  # again, with what tells its base from others
            about = {**written.metadata(), LORA_BASE: self.base}
            tensors = {name: written.get_tensor(name) for name in written.keys()}  # noqa: SIM118  it is no dict
        save_file(tensors, file, metadata=about)
