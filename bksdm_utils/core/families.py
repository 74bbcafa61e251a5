"""All that differs between Stable Diffusion v1, v2 and SDXL.

Versions 1 and 2 differ in their configs (heads, width of the text, ε or v) and need no code of their own; SDXL has two
text encoders and conditions its U-Net on the pooled text and on image sizes too. (Notebooks 01 and 03.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from diffusers import DiffusionPipeline

TEXT_TOKENS = 77


def is_sdxl(config: Mapping) -> bool:
    """Whether a U-Net config is SDXL's, which adds a pooled text embedding and sizes to its time embedding."""
    return config.get("addition_embed_type") == "text_time"


def text_encoder_names(config: Mapping) -> tuple[str, ...]:
    """The text encoders of a pipeline with a U-Net of this config."""
    return ("text_encoder", "text_encoder_2") if is_sdxl(config) else ("text_encoder",)


class TextConditioning:
    """The frozen text encoder(s) of a pipeline: token ids to the kwargs of its U-Net.

    SDXL concatenates the last but one hidden states of two text encoders, and adds the pooled text of the second and
    the sizes of the image: original, crop and target; here always the whole image.

    Args:
        resolution: pixels a side of the images; the pipeline's own by default.
    """

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None):
        self.encoders = [getattr(pipeline, name) for name in text_encoder_names(pipeline.unet.config)]
        for encoder in self.encoders:
            encoder.requires_grad_(False).eval()
        self.side = resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor

    @torch.no_grad()
    def __call__(self, token_ids: torch.Tensor) -> dict:
        """Token ids (B, T) or (B, 2, T) -> encoder_hidden_states (B, T, D) and, for SDXL, added_cond_kwargs."""
        if len(self.encoders) == 1:
            return {"encoder_hidden_states": self.encoders[0](token_ids)[0]}
        outputs = [e(token_ids[:, i], output_hidden_states=True) for i, e in enumerate(self.encoders)]
        hidden_states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        time_ids = hidden_states.new_tensor([self.side, self.side, 0, 0, self.side, self.side])
        added = {"text_embeds": outputs[1][0], "time_ids": time_ids.repeat(len(token_ids), 1)}
        return {"encoder_hidden_states": hidden_states, "added_cond_kwargs": added}


def unet_inputs(
    config: Mapping, sample_size: int | None = None, batch_size: int = 1, device="meta", dtype=torch.float32
) -> dict:
    """Kwargs of a U-Net's forward pass, zeros of the right shapes; 77 text tokens.

    Args:
        sample_size: side of the latents; the config's own by default.
    """
    side, width = sample_size or config["sample_size"], config["cross_attention_dim"]
    width = width[0] if isinstance(width, (list, tuple)) else width
    zeros = partial(torch.zeros, batch_size, device=device, dtype=dtype)
    inputs = {
        "sample": zeros(config["in_channels"], side, side),
        "timestep": zeros(dtype=torch.long),
        "encoder_hidden_states": zeros(TEXT_TOKENS, width),
    }
    if is_sdxl(config):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    return inputs


def vae_overflows_in_fp16(pipeline: DiffusionPipeline) -> bool:
    """Whether the autoencoder's activations exceed fp16's range, as SDXL's do; bf16 is used instead."""
    return is_sdxl(pipeline.unet.config)
