"""Export as Core ML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from .export import _needs, _quiet, new_folder
from .onnx import parts


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
