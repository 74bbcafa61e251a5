"""Export as one file in the original Stable Diffusion layout (notebook 06)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from ..files import new_folder
from ..models.pipelines import Pipeline, with_unet
from ..models.saving import prefixed, save_tokenizer
from .formats import NotExpressible

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
PAIR = ("resnets", "attentions")
VAE_PARTS = {"conv_norm_out": "norm_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
             "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
             "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut"}  # fmt: skip


OPEN_CLIP = {"embeddings.token_embedding": "token_embedding", "encoder.layers": "transformer.resblocks",
             "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj",
             "final_layer_norm": "ln_final"}  # fmt: skip
UNUSED_LAYER = 23  # of SD-v2's text encoder: its file has 24 layers, of which the last is never used


def save_single_file(pipeline: Pipeline, folder: str | Path, name: str) -> str:
    """One file in the layout of the original Stable Diffusion (v1, v2 or XL), which Automatic1111 and ComfyUI read.

    `folder` gets name.safetensors; name.yaml, the description that Automatic1111 needs beside it, except of SDXL; and
    config/, with which `from_single_file(file, config=…)` of the pipeline loads it offline. That layout always has a
    mid block: a student without one gets one whose residuals are zero. Returns a remark for users of the file.

    Raises:
        NotExpressible: the layout cannot hold the model.
        ValueError: the folder exists.
    """
    unet = with_mid_block(pipeline.unet)
    _check_expressible(unet)
    added = unet.num_parameters() - pipeline.unet.num_parameters()
    tensors = {f"model.diffusion_model.{k}": t for k, t in ldm_unet(unet).items()}
    tensors |= {f"first_stage_model.{k}": t for k, t in ldm_vae(pipeline.vae).items()}
    tensors |= _ldm_texts(pipeline)
    tensors |= {mark: torch.zeros(1) for mark in _marks(pipeline.scheduler.config)}
    with new_folder(folder) as part:
        save_file({k: t.contiguous() for k, t in tensors.items()}, part / f"{name}.safetensors")
        if not _is_xl(pipeline):
            (part / f"{name}.yaml").write_text(yaml.safe_dump(ldm_config(unet, pipeline), sort_keys=False))
        _save_configs(with_unet(pipeline, unet), part / "config")
    return _remark(pipeline, added)


def _is_xl(pipeline: Pipeline) -> bool:
    return isinstance(pipeline, StableDiffusionXLPipeline)


def _ldm_texts(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """The text encoders' weights: SD-v1's by transformers' names, SD-v2's by OpenCLIP's, SDXL has one of each."""
    first = pipeline.text_encoder.state_dict()
    if not _is_xl(pipeline) and pipeline.unet.config.use_linear_projection:
        return {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip_text(first).items()}
    start = "conditioner.embedders.0" if _is_xl(pipeline) else "cond_stage_model"
    tensors = {f"{start}.transformer.{prefixed(k)}": t for k, t in first.items() if not k.endswith("position_ids")}
    if _is_xl(pipeline):
        second = open_clip_text(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    return tensors


def open_clip_text(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's weights by OpenCLIP's names, where queries, keys and values are one matrix."""
    named = {prefixed(name).removeprefix("text_model."): tensor for name, tensor in state.items()}
    tensors = {"positional_embedding": named.pop("embeddings.position_embedding.weight")}
    projection = named.pop("text_projection.weight", None)  # SD-v2 has none that is used; its width is read from it
    tensors["text_projection"] = (
        torch.eye(tensors["positional_embedding"].shape[1]) if projection is None else projection.T
    )
    for name in [name for name in named if ".q_proj." in name]:
        parts = [named.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        named[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    for name, tensor in named.items():
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if not name.endswith("position_ids"):
            tensors[name] = tensor
    last = f"transformer.resblocks.{UNUSED_LAYER - 1}."
    if projection is None and f"{last}ln_1.weight" in tensors:
        unused = {name.replace(last, f"transformer.resblocks.{UNUSED_LAYER}."): torch.zeros_like(tensor)
                  for name, tensor in tensors.items() if name.startswith(last)}  # fmt: skip
        tensors |= unused
    return tensors


def _marks(schedule: Mapping) -> list[str]:
    """Names of empty tensors by which other programs know v-prediction and a schedule that ends in pure noise."""
    v_pred = schedule["prediction_type"] == "v_prediction"
    return ["v_pred"] * v_pred + ["ztsnr"] * bool(v_pred and schedule.get("rescale_betas_zero_snr"))


def _remark(pipeline: Pipeline, added: int) -> str:
    mid_block = f"a mid block that changes nothing was added, {added:,} parameters; " if added else ""
    if pipeline.text_encoder.config.hidden_size in (768, 1024):  # CLIP ViT-L/14 of SD-v1 and SDXL, ViT-H/14 of SD-v2
        return mid_block + "not yet tried in Automatic1111 and ComfyUI themselves"
    return mid_block + ("Automatic1111 and ComfyUI expect the text encoder CLIP ViT-L/14 or ViT-H/14, which this one "
                        "is not: diffusers loads the file, they do not")  # fmt: skip


def with_mid_block(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The U-Net itself, or one without a mid block with one that adds zero, so that its output is the same."""
    if unet.mid_block is not None:
        return unet
    config = {**unet.config, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    whole = UNet2DConditionModel.from_config(config).to(unet.device, unet.dtype).eval()
    for parameter in whole.mid_block.parameters():
        parameter.data.zero_()
    whole.load_state_dict(unet.state_dict(), strict=False)
    return whole


def _check_expressible(unet: UNet2DConditionModel) -> None:
    layers = {len(block.resnets) for block in unet.down_blocks}
    if len(layers) > 1 or any(len(block.resnets) != max(layers) + 1 for block in unet.up_blocks):
        raise NotExpressible(f"the original layout has as many layers in every stage, this U-Net {sorted(layers)}: "
                             "use diffusers")  # fmt: skip


def ldm_unet(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A U-Net's weights by the names of the original Stable Diffusion: input_blocks.4.0.in_layers.2.weight."""
    names = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
              "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2", "add_embedding.linear_1": "label_emb.0.0",
              "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
    layers = len(unet.down_blocks[0].resnets)  # in every stage; one more on the way up
    for i in range(len(unet.down_blocks)):
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
        for j, (k, kind) in itertools.product(range(layers), enumerate(PAIR)):
            names[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{i * (layers + 1) + j + 1}.{k}"
    for i, block in enumerate(unet.up_blocks):
        last = f"output_blocks.{(i + 1) * (layers + 1) - 1}"
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"{last}.{1 + hasattr(block, 'attentions')}.conv"
        for j, (k, kind) in itertools.product(range(layers + 1), enumerate(PAIR)):
            names[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{i * (layers + 1) + j}.{k}"
    return {_renamed(name, names): tensor for name, tensor in unet.state_dict().items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module = next(m for m in names if name.startswith(m + "."))
    layer, _, rest = name.removeprefix(f"{module}.").partition(".")
    return ".".join([names[module], RESNET[layer] if ".resnets." in module else layer, rest]).rstrip(".")


def ldm_vae(vae: nn.Module) -> dict[str, torch.Tensor]:
    """An autoencoder's weights by their original names; its attentions are convolutions of one pixel there."""
    last, renamed = len(vae.config.up_block_types) - 1, {}
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        new = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{last - int(m[1])}", new)
        new = re.sub(r"down_blocks\.(\d)", r"down.\1", new).replace(".resnets.", ".block.")
        for ours, theirs in VAE_PARTS.items():
            new = new.replace(ours, theirs)
        renamed[new] = tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
    return renamed


def ldm_config(unet: UNet2DConditionModel, pipeline: StableDiffusionPipeline) -> dict:
    """The original's description of a model, as Automatic1111 reads it from a .yaml beside the checkpoint."""
    config, vae = unet.config, pipeline.vae.config
    width, schedule = config.block_out_channels[0], pipeline.scheduler.config
    attending = [2**i for i, kind in enumerate(config.down_block_types) if "CrossAttn" in kind]
    network = {
        "in_channels": config.in_channels, "out_channels": config.out_channels, "model_channels": width,
        "num_res_blocks": config.layers_per_block, "attention_resolutions": attending,
        "channel_mult": [channels // width for channels in config.block_out_channels],
        "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": config.cross_attention_dim,
        "use_checkpoint": False, "legacy": False, "image_size": 32,
    }  # fmt: skip
    text = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    if config.use_linear_projection:  # SD-v2: heads of one width, not one number of heads
        text = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
                "params": {"freeze": True, "layer": "penultimate"}}  # fmt: skip
        network |= {"num_head_channels": width // config.attention_head_dim[0], "use_linear_in_transformer": True}
    else:
        network["num_heads"] = config.attention_head_dim
    first = {
        "embed_dim": vae.latent_channels, "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {"double_z": True, "z_channels": vae.latent_channels, "resolution": 256, "in_channels": 3,
                     "out_ch": 3, "ch": vae.block_out_channels[0], "num_res_blocks": vae.layers_per_block,
                     "ch_mult": [channels // vae.block_out_channels[0] for channels in vae.block_out_channels],
                     "attn_resolutions": [], "dropout": 0.0},
    }  # fmt: skip
    parameterization = "v" if schedule.prediction_type == "v_prediction" else "eps"
    params = {
        "linear_start": schedule.beta_start, "linear_end": schedule.beta_end, "parameterization": parameterization,
        "timesteps": schedule.num_train_timesteps, "first_stage_key": "jpg", "cond_stage_key": "txt",
        "conditioning_key": "crossattn", "scale_factor": vae.scaling_factor, "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first},
        "cond_stage_config": text,
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _save_configs(pipeline: Pipeline, folder: Path) -> None:
    """A diffusers folder without its weights."""
    folder.mkdir()
    pipeline.save_config(folder)
    for part in ("unet", "vae", "scheduler"):
        getattr(pipeline, part).save_config(folder / part)
    for number in ("", "_2") if _is_xl(pipeline) else ("",):
        getattr(pipeline, f"text_encoder{number}").config.save_pretrained(folder / f"text_encoder{number}")
        save_tokenizer(getattr(pipeline, f"tokenizer{number}"), folder / f"tokenizer{number}")
