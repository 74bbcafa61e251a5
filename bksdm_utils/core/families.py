"""All that differs between SD-v1, SD-v2 and SDXL."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline


class TextConditioning:
    """The frozen text encoder(s) of a pipeline: token ids to what its U-Net is told beside latents and timesteps.

    SDXL joins the last but one hidden states of two text encoders, and adds the pooled text of the second and the sizes
    of the picture: original, crop and target; here always the whole picture.

    Args:
        resolution: pixels a side of the pictures; the pipeline's own by default.
    """

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None):
        names = ("text_encoder", "text_encoder_2")
        self.encoders = [e for e in (getattr(pipeline, name, None) for name in names) if e is not None]
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
