"""Samples an image with the ONNX files beside this one, without the package that exported them.

    python sample.py "a big red boat on the sea" --output boat.png

Needs onnxruntime, numpy, pillow, transformers (the tokenizer) and diffusers (the scheduler, in PyTorch).
"""

import argparse
import json
from pathlib import Path

import diffusers
import numpy as np
import onnxruntime
import torch
from PIL import Image
from transformers import CLIPTokenizer


def sample(folder: Path, prompt: str, seed: int, steps: int, guidance: float) -> Image.Image:
    """One image: text encoder, denoising steps with guidance, decoder."""
    files = (str(folder / name / "model.onnx") for name in ("unet", "text_encoder", "vae_decoder"))
    providers = onnxruntime.get_available_providers()
    unet, text_encoder, decoder = (onnxruntime.InferenceSession(file, providers=providers) for file in files)
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, settings["_class_name"]).from_pretrained(folder / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(["", prompt], padding="max_length", truncation=True, return_tensors="np").input_ids
    (hidden_states,) = text_encoder.run(None, {"input_ids": ids.astype(np.int64)})
    inputs = {"encoder_hidden_states": hidden_states}
    scheduler.set_timesteps(steps)
    shape, generator = unet.get_inputs()[0].shape[1:], torch.Generator().manual_seed(seed)
    latents = torch.randn(1, *shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        inputs["timestep"] = np.array(t, np.float32)
        inputs["sample"] = scheduler.scale_model_input(torch.cat([latents] * 2), t).numpy()
        unguided, guided = torch.from_numpy(unet.run(None, inputs)[0]).chunk(2)
        prediction = unguided + guidance * (guided - unguided) if guidance > 1 else guided
        latents = scheduler.step(prediction, t, latents).prev_sample
    pixels = decoder.run(None, {"latent_sample": latents.numpy()})[0][0].transpose(1, 2, 0)
    return Image.fromarray(((pixels / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--output", default="image.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=7.5)
    args = parser.parse_args()
    folder = Path(__file__).resolve().parent
    sample(folder, args.prompt, args.seed, args.steps, args.guidance).save(args.output)
