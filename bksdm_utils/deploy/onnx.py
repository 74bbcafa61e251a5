"""Export as ONNX (notebook 06)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from ..files import new_folder
from .formats import check_sd, quiet, require, save_tokenizer


class _UNet(nn.Module):
    """A U-Net with plain tensors in and out; one timestep for the whole batch."""

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
    """Scaled latents to images in -1 … 1."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor):
        return self.vae.decode(latent_sample / self.vae.config.scaling_factor, return_dict=False)[0]


def parts(pipeline: StableDiffusionPipeline) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor], str]]:
    """The networks of sampling: name -> (network, example of its inputs for a batch of two, name of its output).

    The networks are copies in full precision, so that the pipeline's own stay as they are.

    Raises:
        NotExpressible: an SDXL pipeline.
    """
    check_sd(pipeline)
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    tokens, width = pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim
    latents, hidden_states = torch.randn(2, channels, side, side), torch.randn(2, tokens, width)
    inputs = {"sample": latents, "timestep": torch.tensor(1.0), "encoder_hidden_states": hidden_states}
    ids = torch.ones(2, tokens, dtype=torch.int64)
    own = {name: copy.deepcopy(getattr(pipeline, name)).to("cpu", torch.float32).eval()
           for name in ("unet", "text_encoder", "vae")}  # fmt: skip
    own["vae"].disable_slicing()  # which pipelines on a GPU have, and which would fix the number of images
    return {
        "unet": (_UNet(own["unet"]), inputs, "out_sample"),
        "text_encoder": (_TextEncoder(own["text_encoder"]), {"input_ids": ids}, "last_hidden_state"),
        "vae_decoder": (_Decoder(own["vae"]), {"latent_sample": latents}, "sample"),
    }


def save_onnx(pipeline: StableDiffusionPipeline, folder: str | Path) -> str:
    """U-Net, text encoder and decoder as ONNX, with tokenizer, scheduler, and sample.py, which samples with them.

    The number of images is free, their size is the model's. Inputs and outputs have the names of diffusers' ONNX
    pipelines; the decoder, unlike theirs, divides by the scaling factor itself. Weights are in files beside the graphs,
    as a full-size U-Net needs.

    Raises:
        NotInstalled: onnx, onnxscript or onnxruntime, which sample.py needs, is missing.
        NotExpressible: an SDXL pipeline.
        ValueError: the folder exists.
    """
    require("onnx", "onnxscript", "onnxruntime")
    with new_folder(folder) as part, torch.no_grad():
        for name, (network, inputs, output) in parts(pipeline).items():
            (part / name).mkdir()
            batch = torch.export.Dim("batch", min=1, max=64)
            shapes = {key: {0: batch} if tensor.ndim else {} for key, tensor in inputs.items()}
            with quiet():
                torch.onnx.export(
                    network, (), part / name / "model.onnx", kwargs=inputs, input_names=list(inputs), dynamo=True,
                    output_names=[output], dynamic_shapes=shapes, external_data=True, verbose=False,
                )  # fmt: skip
        save_tokenizer(pipeline.tokenizer, part / "tokenizer")
        pipeline.scheduler.save_pretrained(part / "scheduler")
        side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
        (part / "latents.json").write_text(json.dumps([channels, side, side]))
        shutil.copy(Path(__file__).with_name("onnx_sample.py"), part / "sample.py")
    return "sample.py beside it needs onnxruntime, a tokenizer and a scheduler"
