"""Export as ONNX."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from .export import _check_sd, _needs, _quiet, _save_tokenizer, new_folder


class _UNet(nn.Module):
    """A U-Net with plain tensors in and out; `timestep` is one number for the whole batch."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor):
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _TextEncoder(nn.Module):
    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor):
        return self.text_encoder(input_ids)[0]


class _Decoder(nn.Module):
    """Latents, as the U-Net knows them, to pictures in -1 … 1."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor):
        return self.vae.decode(latent_sample / self.vae.config.scaling_factor, return_dict=False)[0]


def parts(
    pipeline: StableDiffusionPipeline, batch: int = 2
) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor], str]]:
    """What a program needs to draw: name -> (network, example of its inputs, name of its output).

    The networks are copies in full precision: others draw on with the pipeline's own.

    Raises:
        NotExpressible: an SDXL pipeline.
    """
    _check_sd(pipeline)
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    room, width = pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim
    latents = torch.randn(batch, channels, side, side)
    unet = {"sample": latents, "timestep": torch.tensor(1.0), "encoder_hidden_states": torch.randn(batch, room, width)}
    ids = torch.ones(batch, room, dtype=torch.int64)
    own = {name: copy.deepcopy(getattr(pipeline, name)).to("cpu", torch.float32).eval()
           for name in ("unet", "text_encoder", "vae")}  # fmt: skip
    own["vae"].disable_slicing()  # which a GPU's pipelines have, and which would fix the number of pictures
    return {
        "unet": (_UNet(own["unet"]), unet, "out_sample"),
        "text_encoder": (_TextEncoder(own["text_encoder"]), {"input_ids": ids}, "last_hidden_state"),
        "vae_decoder": (_Decoder(own["vae"]), {"latent_sample": latents}, "sample"),
    }


def save_onnx(pipeline: StableDiffusionPipeline, folder: str | Path) -> Path:
    """U-Net, text encoder and decoder as ONNX, with tokenizer, scheduler, and draw.py, which draws by them.

    The number of pictures is free, their size is the model's. Inputs and outputs bear the names of diffusers' ONNX
    pipelines; the decoder, other than theirs, divides by the scaling factor itself. Weights lie beside the graphs, as
    those of a full-size U-Net must.

    Raises:
        NotInstalled: onnx, onnxscript or onnxruntime, by which draw.py draws, is missing.
        NotExpressible: an SDXL pipeline.
        ValueError: the folder is there already.
    """
    _needs("onnx", "onnxscript", "onnxruntime")
    with new_folder(folder) as part, torch.no_grad():
        for name, (network, inputs, output) in parts(pipeline).items():
            (part / name).mkdir()
            batch = torch.export.Dim("batch", min=1, max=64)
            shapes = {key: {0: batch} if tensor.ndim else {} for key, tensor in inputs.items()}
            with _quiet():
                torch.onnx.export(
                    network, (), part / name / "model.onnx", kwargs=inputs, input_names=list(inputs), dynamo=True,
                    output_names=[output], dynamic_shapes=shapes, external_data=True, verbose=False,
                )  # fmt: skip
        _save_tokenizer(pipeline.tokenizer, part / "tokenizer")
        pipeline.scheduler.save_pretrained(part / "scheduler")
        side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
        (part / "latents.json").write_text(json.dumps([channels, side, side]))
        shutil.copy(Path(__file__).with_name("onnx_sample.py"), part / "draw.py")
    return Path(folder)
