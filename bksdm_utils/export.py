"""Pipelines out: a diffusers folder with its card, a single file, ONNX, Core ML.

Each export is written under a temporary name and renamed at the end, never over anything that is there, and made to be
loaded by programs that know nothing of this package.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from .sampling import with_unet

# --- what every export does -------------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` once everything in it is written.

    Raises:
        ValueError: `folder` is there and not empty, or cannot be written.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is there already: name another folder, or remove it first")
        part.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): name a folder of your own") from error
    try:
        yield part
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Converters print hundreds of lines that nobody can act on; what goes wrong they raise."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class NotInstalled(ValueError):
    """An export needs a package that is not here; the message says how to install it."""


class NotExpressible(ValueError):
    """A format cannot hold this model; the message says which one can."""


def _needs(*packages: str) -> list:
    """Optional packages, imported."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise NotInstalled(
            f"this export needs {error.name}, which is not installed: pip install -e '.[export]'"
        ) from error


def _check_sd(pipeline: StableDiffusionPipeline) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise NotExpressible(
            f"this export is written for SD-v1 and SD-v2, not for a {type(pipeline).__name__}: export a diffusers "
            "folder instead"
        )


def _save_tokenizer(tokenizer, folder: Path) -> None:
    """With vocab.json and merges.txt, which transformers 5 no longer writes and transformers 4 wants."""
    tokenizer.save_pretrained(folder)
    if (folder / "vocab.json").is_file():
        return
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


# --- diffusers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What a model card tells; what is None is said to be not recorded.

    Attributes:
        scores: name -> "value ± error"; they mean something with `protocol` and `num_images` only.
        base_model: folder or hub id of the teacher.
    """

    title: str
    plan: str
    base_model: str
    data: str | None = None
    steps: int | None = None
    scores: Mapping[str, str] = field(default_factory=dict)
    protocol: str | None = None
    num_images: int | None = None
    licence: str | None = None
    num_parameters: int | None = None
    guidance_scale: float = 7.5
    num_inference_steps: int = 25


CARD = """\
---
{head}---

# {title}

A Stable Diffusion whose U-Net had blocks removed and was repaired by knowledge distillation, after BK-SDM
([arXiv 2305.15798](https://arxiv.org/abs/2305.15798)).

| | |
|---|---|
| removal plan | {plan} |
| U-Net parameters | {num_parameters} |
| teacher | {base_model} |
| training data | {data} |
| optimizer steps | {steps} |
| licence | {licence} |

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("…", guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps}).images[0]
```

## Scores

Protocol: {protocol}; pictures: {num_images}. Scores of other protocols or of another number of
pictures are not comparable.

| score | value |
|---|---|
{scores}
## Limits

A distilled student inherits what its teacher learned from its data, its biases and its licence's terms. It was not
checked for safety; no safety checker is included.
"""


def model_card(card: Card) -> str:
    """A model card in Markdown, with the head that the Hugging Face hub reads."""

    def known(value: object) -> str:
        return "not recorded" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    head = yaml.safe_dump({
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": card.base_model,
        "license": card.licence or "other", "tags": ["stable-diffusion", "bk-sdm", "knowledge-distillation"],
    }, sort_keys=False)  # fmt: skip
    scores = "".join(f"| {name} | {value} |\n" for name, value in card.scores.items()) or "| not recorded | |\n"
    told = {name: known(value) for name, value in vars(card).items()}
    return CARD.format(head=head, **told | {"scores": scores})


def save_diffusers(pipeline: StableDiffusionPipeline, folder: str | Path, card: Card) -> Path:
    """A plain diffusers folder with its model card; `from_pretrained(folder)` loads it anywhere.

    The text encoder's names get the prefix `text_model.`, which transformers 5 no longer writes: without it
    transformers 4 keeps random weights in silence.

    Raises:
        ValueError: the folder is there already or cannot be written.
    """
    with new_folder(folder) as part:
        pipeline.save_pretrained(part)
        for number in ("", "_2"):  # SDXL has two
            if (tokenizer := getattr(pipeline, f"tokenizer{number}", None)) is None:
                continue
            _save_tokenizer(tokenizer, part / f"tokenizer{number}")
            for file in (part / f"text_encoder{number}").glob("*.safetensors"):
                save_file({_prefixed(name): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
        (part / "README.md").write_text(model_card(card), encoding="utf-8")
    return Path(folder)


def _prefixed(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


# --- single file ------------------------------------------------------------------------------------------------------

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
PAIR = ("resnets", "attentions")
VAE_PARTS = {"conv_norm_out": "norm_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
             "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
             "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut"}  # fmt: skip


def save_single_file(pipeline: StableDiffusionPipeline, folder: str | Path, name: str) -> str:
    """One file in the layout of the original Stable Diffusion, which Automatic1111 and ComfyUI read.

    `folder` gets name.safetensors; name.yaml, the description that Automatic1111 wants beside it; and config/, with
    which `StableDiffusionPipeline.from_single_file(file, config=…)` loads it offline.

    That layout always has a middle block. A student without one gets one that changes nothing: its last layers are
    zero, and what they are added to passes unchanged.

    Returns:
        what whoever passes the file on should know.

    Raises:
        NotExpressible: the layout cannot hold the model.
        ValueError: the folder is there already.
    """
    _check_sd(pipeline)
    unet = with_mid_block(pipeline.unet)
    _check_expressible(unet)
    added = sum(p.numel() for p in unet.parameters()) - sum(p.numel() for p in pipeline.unet.parameters())
    tensors = {f"model.diffusion_model.{k}": t for k, t in ldm_unet(unet).items()}
    tensors |= {f"first_stage_model.{k}": t for k, t in ldm_vae(pipeline.vae).items()}
    texts = pipeline.text_encoder.state_dict().items()
    tensors |= {f"cond_stage_model.transformer.{_prefixed(k)}": t for k, t in texts if not k.endswith("position_ids")}
    with new_folder(folder) as part:
        save_file({k: t.contiguous() for k, t in tensors.items()}, part / f"{name}.safetensors")
        (part / f"{name}.yaml").write_text(yaml.safe_dump(ldm_config(unet, pipeline), sort_keys=False))
        _save_configs(with_unet(pipeline, unet), part / "config")
    return _about_single_file(pipeline, added)


def _about_single_file(pipeline: StableDiffusionPipeline, added: int) -> str:
    told = [f"a middle block that changes nothing was added, {added:,} parameters"] if added else []
    if pipeline.text_encoder.config.hidden_size != 768:
        told.append("Automatic1111 and ComfyUI take the text encoder for CLIP ViT-L/14, which this one is not: "
                    "diffusers loads the file, they do not")  # fmt: skip
    else:
        told.append("not yet tried in Automatic1111 and ComfyUI themselves")
    return "; ".join(told)


def with_mid_block(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The U-Net itself, or one without a mid block with one of which the residuals are zero: it draws the same."""
    if unet.mid_block is not None:
        return unet
    config = {**unet.config, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    whole = UNet2DConditionModel.from_config(config).to(unet.device, unet.dtype).eval()
    for parameter in whole.mid_block.parameters():
        parameter.data.zero_()
    whole.load_state_dict(unet.state_dict(), strict=False)
    return whole


def _check_expressible(unet: UNet2DConditionModel) -> None:
    if unet.config.use_linear_projection:
        raise NotExpressible(
            "single files are written for models of SD-v1's kind only: SD-v2 names its text encoder otherwise. Export "
            "a diffusers folder instead"
        )
    layers = {len(block.resnets) for block in unet.down_blocks}
    if len(layers) > 1 or any(len(block.resnets) != max(layers) + 1 for block in unet.up_blocks):
        raise NotExpressible(
            f"the original layout has as many layers in every stage, this U-Net {sorted(layers)}: export a diffusers "
            "folder instead"
        )


def ldm_unet(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A U-Net's weights by the names of the original Stable Diffusion: input_blocks.4.0.in_layers.2.weight."""
    places = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
              "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    number = 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            number += 1
            places |= {f"down_blocks.{i}.{kind}.{j}": f"input_blocks.{number}.{k}" for k, kind in enumerate(PAIR)}
        if block.downsamplers:
            number += 1
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = -1
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            number += 1
            places |= {f"up_blocks.{i}.{kind}.{j}": f"output_blocks.{number}.{k}" for k, kind in enumerate(PAIR)}
        if block.upsamplers:
            after = 1 + hasattr(block, "attentions")
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number}.{after}.conv"
    return {_placed(name, places): tensor for name, tensor in unet.state_dict().items()}


def _placed(name: str, places: Mapping[str, str]) -> str:
    place = next(p for p in places if name.startswith(p + "."))
    rest = name[len(place) + 1 :]
    if ".resnets." in place:
        layer, kind = rest.split(".")
        rest = f"{RESNET[layer]}.{kind}"
    return f"{places[place]}.{rest}"


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
        "num_heads": config.attention_head_dim, "use_spatial_transformer": True, "transformer_depth": 1,
        "context_dim": config.cross_attention_dim, "use_checkpoint": False, "legacy": False, "image_size": 32,
    }  # fmt: skip
    first = {
        "embed_dim": vae.latent_channels, "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {"double_z": True, "z_channels": vae.latent_channels, "resolution": 256, "in_channels": 3,
                     "out_ch": 3, "ch": vae.block_out_channels[0], "num_res_blocks": vae.layers_per_block,
                     "ch_mult": [channels // vae.block_out_channels[0] for channels in vae.block_out_channels],
                     "attn_resolutions": [], "dropout": 0.0},
    }  # fmt: skip
    params = {
        "linear_start": schedule.beta_start, "linear_end": schedule.beta_end, "parameterization": _predicts(schedule),
        "timesteps": schedule.num_train_timesteps, "first_stage_key": "jpg", "cond_stage_key": "txt",
        "conditioning_key": "crossattn", "scale_factor": vae.scaling_factor, "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _predicts(schedule) -> str:
    return "v" if schedule.prediction_type == "v_prediction" else "eps"


def _save_configs(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """All of a diffusers folder but its weights."""
    folder.mkdir()
    pipeline.save_config(folder)
    for part in ("unet", "vae", "scheduler"):
        getattr(pipeline, part).save_config(folder / part)
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    _save_tokenizer(pipeline.tokenizer, folder / "tokenizer")


# --- ONNX -------------------------------------------------------------------------------------------------------------


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
        shutil.copy(Path(__file__).with_name("onnx_draw.py"), part / "draw.py")
    return Path(folder)


# --- Core ML ----------------------------------------------------------------------------------------------------------


def save_core_ml(pipeline: StableDiffusionPipeline, folder: str | Path) -> Path:
    """U-Net, text encoder and decoder as .mlpackage of full precision, for two latents at once, as guidance wants.

    Converted and checked on Linux (`check_core_ml`); not run on Apple hardware.

    Raises:
        NotInstalled: coremltools is missing.
        NotExpressible: an SDXL pipeline.
        ValueError: the folder is there already.
    """
    (coremltools,) = _needs("coremltools")
    with new_folder(folder) as part, torch.no_grad():
        for name, (network, inputs, output) in parts(pipeline).items():
            program = torch.export.export(network, (), kwargs=inputs).run_decompositions({})
            program = _without_aliases(program)
            kinds = {torch.int64: np.int32, torch.float32: np.float32}
            tensors = [coremltools.TensorType(name=key, shape=tuple(t.shape) or (1,), dtype=kinds[t.dtype])
                       for key, t in inputs.items()]  # fmt: skip
            with _quiet():
                converted = coremltools.convert(
                    program, inputs=tensors, outputs=[coremltools.TensorType(name=output)], convert_to="mlprogram",
                    compute_precision=coremltools.precision.FLOAT32, skip_model_load=True,
                    minimum_deployment_target=coremltools.target.macOS14,
                )  # fmt: skip
            converted.save(str(part / f"{name}.mlpackage"))
    return Path(folder)


def check_core_ml(pipeline: StableDiffusionPipeline, folder: str | Path) -> dict[str, int]:
    """Compares the packages in `folder` with the pipeline, as far as that goes without Apple's machines.

    Returns:
        network -> how many of its weights were found in the package, bit for bit; that is all of them.

    Raises:
        ValueError: an input or output has another shape, or a weight is missing, differs or is not finite.
    """
    (coremltools,) = _needs("coremltools")
    found = {}
    for name, (network, inputs, output) in parts(pipeline).items():
        with _quiet(), torch.no_grad():
            package = coremltools.models.MLModel(str(Path(folder) / f"{name}.mlpackage"), skip_model_load=True)
            stored = coremltools.optimize.coreml.get_weights_metadata(package, weight_threshold=0)
            made = network(**inputs)
        told = package.get_spec().description
        shapes = {part.name: tuple(part.type.multiArrayType.shape) for part in (*told.input, *told.output)}
        expected = {key: tuple(tensor.shape) or (1,) for key, tensor in {**inputs, output: made}.items()}
        if shapes != expected:
            raise ValueError(f"{name}.mlpackage takes and gives {shapes}: expected {expected}. Export it again")
        weights = dict(network.named_parameters())
        if name == "vae_decoder":
            weights = {k: t for k, t in weights.items() if k.startswith(("vae.decoder", "vae.post_quant_conv"))}
        lost = _lost({key: np.asarray(weight.val, np.float32).tobytes() for key, weight in stored.items()}, weights)
        if lost:
            raise ValueError(f"{name}.mlpackage lacks or changes {len(lost)} weights, such as {lost[0]}: export again")
        found[name] = len(weights)
    return found


def _lost(stored: Mapping[str, bytes], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of weights that are not finite or not stored under their name; of equal ones one name stands for all."""
    anywhere = set(stored.values())

    def held(name: str, tensor: torch.Tensor) -> bool:
        bits, own = tensor.detach().numpy().tobytes(), stored.get(f"p_{name.replace('.', '_')}")
        return bool(tensor.isfinite().all()) and (bits in anywhere if own is None else bits == own)

    return [name for name, tensor in weights.items() if not held(name, tensor)]


def _without_aliases(program):
    """Drops `aten.alias`, which passes a tensor through and which coremltools does not know."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


# --- the hub ----------------------------------------------------------------------------------------------------------


def upload(folder: str | Path, repo_id: str | None, push_to_hub: bool = False) -> None:
    """Shows what would be uploaded to the Hugging Face hub, and uploads it only when told to.

    Raises:
        ValueError: it shall be uploaded, and `repo_id` does not say where to.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    total = sum(file.stat().st_size for file in files)
    print(f"to {repo_id or '(no repo_id)'}, which is made private if it is new: {len(files)} files, "
          f"{total / 1e6:.1f} MB")  # fmt: skip
    for file in files:
        print(f"  {file.relative_to(folder)}  {file.stat().st_size / 1e6:.2f} MB")
    if not push_to_hub:
        print("nothing was uploaded: push_to_hub is False")
        return
    if not repo_id:
        raise ValueError("push_to_hub is True, but there is no repo_id: expected one such as name/bk-sdm-small")
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=True, exist_ok=True)
    print(f"{repo_id} is {'private' if api.repo_info(repo_id).private else 'public: everybody sees what comes now'}")
    api.upload_folder(folder_path=folder, repo_id=repo_id)
