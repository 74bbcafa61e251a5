"""Exports of the single networks: ONNX and Core ML (notebook 06)."""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ..files import new_folder
from ..models.saving import save_tokenizer
from .formats import check_sd, require


class _Network(nn.Module):
    """A network with plain tensors in and out."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


class _UNet(_Network):
    """One timestep for the whole batch."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor):
        return self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _TextEncoder(_Network):
    def forward(self, input_ids: torch.Tensor):
        return self.network(input_ids)[0]


class _Decoder(_Network):
    """Scaled latents to images in -1 … 1."""

    def forward(self, latent_sample: torch.Tensor):
        return self.network.decode(latent_sample / self.network.config.scaling_factor, return_dict=False)[0]


def parts(pipeline: StableDiffusionPipeline) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor], str]]:
    """The networks of sampling: name -> (network, example of its inputs for a batch of two, name of its output).

    The networks are copies in full precision, so that the pipeline's own stay as they are.
    """
    check_sd(pipeline)
    config, tokens = pipeline.unet.config, pipeline.tokenizer.model_max_length
    latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    inputs = {"sample": latents, "timestep": torch.tensor(1.0),
              "encoder_hidden_states": torch.randn(2, tokens, config.cross_attention_dim)}  # fmt: skip
    unet, text_encoder, vae = (copy.deepcopy(part).to("cpu", torch.float32).eval()
                               for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae))  # fmt: skip
    vae.disable_slicing()  # which pipelines on a GPU have, and which would fix the number of images
    del vae.encoder, vae.quant_conv
    ids = {"input_ids": torch.ones(2, tokens, dtype=torch.int64)}
    return {
        "unet": (_UNet(unet), inputs, "out_sample"),
        "text_encoder": (_TextEncoder(text_encoder), ids, "last_hidden_state"),
        "vae_decoder": (_Decoder(vae), {"latent_sample": latents}, "sample"),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block nothing is printed: converters print hundreds of lines, and raise what goes wrong."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def save_onnx(pipeline: StableDiffusionPipeline, folder: str | Path) -> str:
    """U-Net, text encoder and decoder as ONNX, with tokenizer, scheduler, and sample.py, which samples with them.

    The number of images is free, their size is the model's. Inputs and outputs have the names of diffusers' ONNX
    pipelines; the decoder, unlike theirs, divides by the scaling factor itself. Weights are in files beside the graphs,
    as a full-size U-Net needs.

    Raises:
        NotAvailable: onnx, onnxscript or onnxruntime, which sample.py needs, is missing.
        NotExpressible: an SDXL pipeline.
        ValueError: the folder exists.
    """
    require("export", "onnx", "onnxscript", "onnxruntime")
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
        save_tokenizer(pipeline.tokenizer, part / "tokenizer")
        pipeline.scheduler.save_pretrained(part / "scheduler")
        shutil.copy(Path(__file__).with_name("onnx_sample.py"), part / "sample.py")
    return "sample.py beside it needs onnxruntime, a tokenizer and a scheduler"


def save_core_ml(pipeline: StableDiffusionPipeline, folder: str | Path) -> str:
    """U-Net, text encoder and decoder as .mlpackage in full precision, for a batch of two, as guidance needs.

    Converted and checked on Linux (`check_core_ml`); not run on Apple hardware. Raises as `save_onnx`.
    """
    (coremltools,) = require("export", "coremltools")
    dtypes = {torch.int64: np.int32, torch.float32: np.float32}
    with new_folder(folder) as part, torch.no_grad():
        for name, (network, inputs, output) in parts(pipeline).items():
            program = torch.export.export(network, (), kwargs=inputs).run_decompositions({})
            for node in list(program.graph.nodes):  # coremltools does not know aten.alias, which returns its input
                if node.target is torch.ops.aten.alias.default:
                    node.replace_all_uses_with(node.args[0])
                    program.graph.erase_node(node)
            program.graph_module.recompile()
            tensors = [coremltools.TensorType(name=key, shape=tuple(t.shape) or (1,), dtype=dtypes[t.dtype])
                       for key, t in inputs.items()]  # fmt: skip
            with _quiet():
                converted = coremltools.convert(
                    program, inputs=tensors, outputs=[coremltools.TensorType(name=output)], convert_to="mlprogram",
                    compute_precision=coremltools.precision.FLOAT32, skip_model_load=True,
                    minimum_deployment_target=coremltools.target.macOS14,
                )  # fmt: skip
            converted.save(str(part / f"{name}.mlpackage"))
    return "not run on Apple hardware"


def check_core_ml(pipeline: StableDiffusionPipeline, folder: str | Path) -> dict[str, int]:
    """Compares the packages in `folder` with the pipeline, as far as that is possible without Apple hardware.

    Returns:
        network -> number of its weights, all of which are in the package bit for bit.

    Raises:
        ValueError: an input or output has another shape, or a weight is missing, differs or is not finite.
    """
    (coremltools,) = require("export", "coremltools")
    counts = {}
    for name, (network, inputs, output) in parts(pipeline).items():
        with _quiet(), torch.no_grad():
            package = coremltools.models.MLModel(str(Path(folder) / f"{name}.mlpackage"), skip_model_load=True)
            weights = coremltools.optimize.coreml.get_weights_metadata(package, weight_threshold=0)
            tensors = {**inputs, output: network(**inputs)}
        description = package.get_spec().description
        shapes = {p.name: tuple(p.type.multiArrayType.shape) for p in (*description.input, *description.output)}
        expected = {key: tuple(tensor.shape) or (1,) for key, tensor in tensors.items()}
        if shapes != expected:
            raise ValueError(f"{name}.mlpackage has inputs and outputs {shapes}: expected {expected}. Export it again")
        stored = {key: np.asarray(weight.val, np.float32).tobytes() for key, weight in weights.items()}
        own = dict(network.named_parameters())
        if faults := [key for key, tensor in own.items() if not _is_stored(key, tensor, stored)]:
            raise ValueError(f"{name}.mlpackage lacks or changes {len(faults)} weights, such as {faults[0]}")
        counts[name] = len(own)
    return counts


def _is_stored(name: str, tensor: torch.Tensor, stored: Mapping[str, bytes]) -> bool:
    """Whether a weight is finite and stored under its name; of equal ones, one name may stand for all."""
    key, value = f"p_{name.replace('.', '_')}", tensor.detach().numpy().tobytes()
    return bool(tensor.isfinite().all()) and value in ([stored[key]] if key in stored else stored.values())
