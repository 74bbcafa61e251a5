"""Export as Core ML (notebook 06)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ..files import new_folder
from .formats import quiet, require
from .onnx import parts


def save_core_ml(pipeline: StableDiffusionPipeline, folder: str | Path) -> str:
    """U-Net, text encoder and decoder as .mlpackage in full precision, for a batch of two, as guidance needs.

    Converted and checked on Linux (`check_core_ml`); not run on Apple hardware.

    Raises:
        NotInstalled: coremltools is missing.
        NotExpressible: an SDXL pipeline.
        ValueError: the folder exists.
    """
    (coremltools,) = require("coremltools")
    dtypes = {torch.int64: np.int32, torch.float32: np.float32}
    with new_folder(folder) as part, torch.no_grad():
        for name, (network, inputs, output) in parts(pipeline).items():
            program = _without_aliases(torch.export.export(network, (), kwargs=inputs).run_decompositions({}))
            tensors = [coremltools.TensorType(name=key, shape=tuple(t.shape) or (1,), dtype=dtypes[t.dtype])
                       for key, t in inputs.items()]  # fmt: skip
            with quiet():
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
    (coremltools,) = require("coremltools")
    counts = {}
    for name, (network, inputs, output) in parts(pipeline).items():
        with quiet(), torch.no_grad():
            package = coremltools.models.MLModel(str(Path(folder) / f"{name}.mlpackage"), skip_model_load=True)
            stored = coremltools.optimize.coreml.get_weights_metadata(package, weight_threshold=0)
            tensors = {**inputs, output: network(**inputs)}
        description = package.get_spec().description
        shapes = {p.name: tuple(p.type.multiArrayType.shape) for p in (*description.input, *description.output)}
        expected = {key: tuple(tensor.shape) or (1,) for key, tensor in tensors.items()}
        if shapes != expected:
            raise ValueError(f"{name}.mlpackage has inputs and outputs {shapes}: expected {expected}. Export it again")
        weights = dict(network.named_parameters())
        if name == "vae_decoder":
            weights = {k: t for k, t in weights.items() if k.startswith(("vae.decoder", "vae.post_quant_conv"))}
        if faults := _faults({k: np.asarray(w.val, np.float32).tobytes() for k, w in stored.items()}, weights):
            raise ValueError(f"{name}.mlpackage lacks or changes {len(faults)} weights, such as {faults[0]}")
        counts[name] = len(weights)
    return counts


def _faults(stored: Mapping[str, bytes], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of weights that are not finite or not stored under their name; equal ones are stored under one name."""
    values = set(stored.values())

    def is_stored(name: str, tensor: torch.Tensor) -> bool:
        value, own = tensor.detach().numpy().tobytes(), stored.get(f"p_{name.replace('.', '_')}")
        return bool(tensor.isfinite().all()) and (value in values if own is None else value == own)

    return [name for name, tensor in weights.items() if not is_stored(name, tensor)]


def _without_aliases(program):
    """Drops `aten.alias`, which returns its input and which coremltools does not know."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program
