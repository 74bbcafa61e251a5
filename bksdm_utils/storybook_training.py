"""Makes the storybook teacher: a VAE, a CLIP and a U-Net, each trained from random weights on `storybook.py`'s world.

    python -m bksdm_utils.storybook_training vae clip unet decoder export    # each resumes where it was stopped

They stand to each other as in Stable Diffusion v1: the U-Net denoises the VAE's latents and attends to the hidden
states of CLIP's frozen text encoder. The U-Net takes longest, and only its training may be spread over processes:
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m bksdm_utils.storybook_training unet`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from . import storybook
from .engine import Draw, Log, Trainer, TrainingConfig, over_processes
from .presets import find_preset
from .run import write_json
from .sampling import load_pipeline
from .scores import Scorer
from .storybook import Scene

MAX_TOKENS = 20  # the longest caption has 15, start and end included
NUM_SCENES = 48_000
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LATENT_CHANNELS, LATENT_SIZE = 4, storybook.SIZE // 4
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD-v1's

CONFIGS = {
    "vae": TrainingConfig(3_000, batch_size=16, learning_rate=2e-3, lr_schedule="cosine", lr_warmup_steps=50,
                          weight_decay=0.0, ema_decay=0.99, checkpoint_steps=200),
    "clip": TrainingConfig(2_300, batch_size=96, learning_rate=2e-3, lr_schedule="cosine", lr_warmup_steps=100,
                           weight_decay=0.05, adam_beta2=0.98, ema_decay=0.99, checkpoint_steps=100),
    "unet": TrainingConfig(9_000, batch_size=32, learning_rate=1e-3, lr_schedule="cosine", lr_decay_start=0.3,
                           lr_warmup_steps=200, ema_decay=0.999, checkpoint_steps=200),
    "decoder": TrainingConfig(1_600, batch_size=16, learning_rate=1e-3, lr_schedule="cosine", lr_warmup_steps=50,
                              weight_decay=0.0, ema_decay=0.99, checkpoint_steps=200),
}  # fmt: skip


# --- the data ---------------------------------------------------------------------------------------------------------


def _drawn(seed: int, split: str) -> np.ndarray:
    return np.asarray(storybook.render(storybook.sample_scene(seed, split), seed))


def pictures(seeds: Sequence[int], split: str = "train") -> torch.Tensor:
    """Renders scenes of a split by their seeds: uint8, (len(seeds), 3, 64, 64)."""
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(partial(_drawn, split=split), seeds, chunksize=256))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def scenes(num_scenes: int, split: str = "train") -> list[Scene]:
    """The scenes that `pictures(range(num_scenes), split)` renders."""
    return [storybook.sample_scene(seed, split) for seed in range(num_scenes)]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to floats in -1 … 1, as the VAE takes them."""
    return images.float() / 127.5 - 1


def to_clip(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to CLIP's normalised floats; 64 x 64 is CLIP's own size here, so nothing is resized."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images.float() / 255 - mean) / std


# --- the networks -----------------------------------------------------------------------------------------------------


def new_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt from `captions`; any text can be written with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """0.8 M parameters: text 96 wide and 3 deep, vision 96 wide and 4 deep over 8 x 8 patches."""
    width = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "projection_dim": 64}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**width, **special, "pad_token_id": tokenizer.pad_token_id, "num_hidden_layers": 3}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    vision = {**width, "num_hidden_layers": 4, "image_size": storybook.SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def new_vae() -> AutoencoderKL:
    """0.7 M parameters, 64 x 64 x 3 to 16 x 16 x 4."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8,
        latent_channels=LATENT_CHANNELS, sample_size=storybook.SIZE,
    )  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """8.6 M parameters; SD-v1's topology, ten times narrower, so that every line of surgery is the same."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, block_out_channels=(32, 64, 128, 128), layers_per_block=2,
        cross_attention_dim=96, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


# --- what each one minimises ------------------------------------------------------------------------------------------


def _edges(images: torch.Tensor) -> torch.Tensor:
    """Horizontal and vertical differences, flattened per picture."""
    return torch.cat([images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)], dim=1)


def vae_loss(vae: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """L1 + L2 + edges + a small KL; images (B, 3, 64, 64) in -1 … 1, noise (B, 4, 16, 16)."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    l2 = F.mse_loss(decoded, images)
    edge = F.l1_loss(_edges(decoded), _edges(images))
    kl = posterior.kl().mean() / noise[0].numel()
    loss = F.l1_loss(decoded, images) + 2 * l2 + edge + 1e-4 * kl
    return {"loss": loss, "psnr": 10 * torch.log10(4 / l2), "kl": kl}


def detail_weight(images: torch.Tensor) -> torch.Tensor:
    """Weights of mean 1 that stress pixels unlike their surroundings, (B, 1, H, W): small things on wide skies."""
    contrast = (images - F.avg_pool2d(images, 15, 1, 7, count_include_pad=False)).abs().mean(1, keepdim=True)
    weight = 0.1 + F.avg_pool2d(contrast, 3, 1, 1)
    return weight / weight.mean((1, 2, 3), keepdim=True)


def decoder_loss(vae: torch.nn.Module, latents: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """L1 + L2 stressed by `detail_weight`, + edges; latents as the VAE takes them, images in -1 … 1."""
    decoded = vae.decode(latents).sample
    error, weight = (decoded - images).abs(), detail_weight(images)
    loss = (weight * (error + 2 * error.square())).mean() + F.l1_loss(_edges(decoded), _edges(images))
    return {"loss": loss, "psnr": 10 * torch.log10(4 / error.square().mean())}


def hard_negatives(scene: Scene, rng: random.Random) -> list[Scene]:
    """Four scenes a word away: two with another object, which is hardest to see, one more change, another layout."""
    changes = [_another_value(scene, kind, rng) for kind in ("object", "object", rng.choice(storybook.ATTRIBUTES))]
    return [*changes, _another_layout(scene, rng)]


def _another_value(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """`scene` with another value of `attribute`, of its second thing as often as of its first."""
    mirrored = replace(scene, things=scene.things[::-1])
    source = mirrored if attribute != "place" and rng.random() < 0.5 else scene
    other = rng.choice([s for s in source.alternatives(attribute) if s != source])
    return other if source is scene else replace(other, things=other.things[::-1])


def _another_layout(scene: Scene, rng: random.Random) -> Scene:
    """The colours swapped or the relation changed; another colour where there is but one thing."""
    if scene.relation is None:
        return _another_value(scene, "colour", rng)
    first, second = scene.things
    if first.colour != second.colour and rng.random() < 0.5:
        return replace(scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))
    return _another_value(scene, "relation", rng)


def clip_loss(
    clip: torch.nn.Module, images: torch.Tensor, token_ids: torch.Tensor, meaning: torch.Tensor
) -> dict[str, torch.Tensor]:
    """CLIP's symmetric contrast, the captions of the batch joined by hard negatives.

    Args:
        images: (B, 3, 64, 64), as `to_clip` gives them.
        token_ids: (B·K, MAX_TOKENS), the first B are the true captions in the order of the images.
        meaning: (B·K,) one number per distinct caption; a text that equals another's true caption is no negative to it.
    """
    output = clip(input_ids=token_ids, pixel_values=images)
    logits = output.logits_per_image  # (B, B·K)
    size, target = len(images), torch.arange(len(images), device=logits.device)
    same = meaning[None] == meaning[:size, None]
    same[target, target] = False
    logits = logits.masked_fill(same, -1e4)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :size].T, target)) / 2
    return {"loss": loss, "accuracy": (logits.argmax(1) == target).float().mean()}


def high_noise_timesteps(uniform: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Uniform numbers to timesteps with a larger share of the noisy ones, where the picture's content is decided."""
    return (uniform ** (1 / 1.3) * num_timesteps).long().clamp(max=num_timesteps - 1)


def min_snr_weight(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """min(SNR, gamma) / SNR for ε-prediction, (B,) (arXiv 2303.09556, equation 5)."""
    snr = alphas_cumprod[timesteps] / (1 - alphas_cumprod[timesteps])
    return snr.clamp(max=gamma) / snr


def unet_loss(unet: torch.nn.Module, scheduler: DDPMScheduler, latents, hidden_states, draw: Draw) -> dict:
    """Min-SNR weighted ε-prediction; latents (B, 4, 16, 16), hidden_states (B, MAX_TOKENS, 96)."""
    device = latents.device
    noise = draw.normal(*latents.shape[1:]).to(device)
    timesteps = high_noise_timesteps(draw.uniform(), scheduler.config.num_train_timesteps).to(device)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy_latents, timesteps, hidden_states).sample
    error = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
    weight = min_snr_weight(scheduler.alphas_cumprod.to(device), timesteps)
    return {"loss": (weight * error).mean(), "mse": error.mean()}


# --- the four runs ----------------------------------------------------------------------------------------------------


def run(trainer: Trainer, loss_function, num_examples: int, log_every: int = 20) -> None:
    """Trains to the end, writing the mean losses of every `log_every` steps to log.csv beside the checkpoint."""
    main = trainer.accelerator.is_main_process
    log = Log(trainer.output_dir / "log.csv", trainer.step) if main else None
    sums, started = {}, time.perf_counter()
    for step in trainer.steps(loss_function, num_examples):
        for name, value in step.losses.items():
            sums[name] = sums.get(name, 0) + value / log_every
        if step.step % log_every == 0 and main:
            seconds = (time.perf_counter() - started) / log_every
            row = {"step": step.step, **{k: round(float(v), 5) for k, v in sums.items()}}
            log.append({**row, "learning_rate": step.learning_rate, "seconds_per_step": round(seconds, 3)})
            print("  ".join(f"{k} {v:.5g}" for k, v in log.rows[-1].items()), flush=True)
        if step.step % log_every == 0:
            sums, started = {}, time.perf_counter()
    trainer.save()


def _save_ema(trainer: Trainer, folder: Path) -> None:
    if trainer.accelerator.is_main_process:
        with trainer.ema_weights() as model:
            model.save_pretrained(folder)


def train_vae(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the VAE and sets its scaling factor so that the latents have unit variance."""
    images = pictures(range(min(num_scenes, 16_000)))
    torch.manual_seed(config.seed)
    vae = new_vae().to(device)
    trainer = Trainer(vae, config, output_dir / "vae", resume=True)

    def loss_function(model, draw):
        batch = to_unit(images[draw.indices]).to(device)
        return vae_loss(model, batch, draw.normal(LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE).to(device))

    run(trainer, loss_function, len(images))
    with trainer.ema_weights(), torch.no_grad():
        latents = vae.encode(to_unit(images[:512]).to(device)).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        vae.save_pretrained(output_dir / "vae")


def train_clip(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the text and vision towers together and saves them with their tokenizer."""
    drawn, images = scenes(num_scenes), pictures(range(num_scenes))
    tokenizer = new_tokenizer([s.caption for s in drawn])
    tokenizer.save_pretrained(output_dir / "clip")
    torch.manual_seed(config.seed)
    trainer = Trainer(new_clip(tokenizer).to(device), config, output_dir / "clip", resume=True)

    def loss_function(model, draw):
        rng = random.Random(f"{draw.seed}-{draw.step}-{draw.positions.start}")
        batch = [drawn[i] for i in draw.indices]
        others = zip(*(hard_negatives(scene, rng) for scene in batch), strict=True)
        captions = [scene.caption for group in (batch, *others) for scene in group]
        numbers = {caption: number for number, caption in enumerate(captions)}
        meaning = torch.tensor([numbers[caption] for caption in captions], device=device)
        tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
        return clip_loss(model, to_clip(images[draw.indices].to(device)), tokens.to(device), meaning)

    run(trainer, loss_function, num_scenes)
    _save_ema(trainer, output_dir / "clip")


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, num_scenes: int, device: str = "cpu") -> torch.Tensor:
    """Scaled latents of the first training scenes, (num_scenes, 4, 16, 16); each process encodes its share."""
    vae = vae.to(device).eval()

    def encode(seeds):
        batches = pictures(seeds).split(256)
        return torch.cat([vae.encode(to_unit(batch).to(device)).latent_dist.mean for batch in batches])

    return over_processes(encode, num_scenes, device).cpu() * vae.config.scaling_factor


def finetune_decoder(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device="cpu") -> None:
    """Trains the VAE's decoder on, its encoder frozen, so that the U-Net's latents keep their meaning.

    Stable Diffusion's own decoders were improved in this way after the fact; here it sharpens small things.
    """
    num_scenes = min(num_scenes, 8_000)
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    images, latents = pictures(range(num_scenes)), encode_pictures(vae, num_scenes, device) / vae.config.scaling_factor
    trainer = Trainer(vae, config, output_dir / "decoder", resume=True)

    def loss_function(model, draw):
        return decoder_loss(model, latents[draw.indices].to(device), to_unit(images[draw.indices]).to(device))

    run(trainer, loss_function, num_scenes)
    _save_ema(trainer, output_dir / "decoder")


def train_unet(output_dir: Path, config: TrainingConfig, num_scenes: int = NUM_SCENES, device: str = "cpu") -> None:
    """Trains the U-Net on the VAE's latents and the frozen text encoder; one caption in ten is empty."""
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "clip")
    text_encoder = CLIPTextModel.from_pretrained(output_dir / "clip").to(device).eval()
    latents = encode_pictures(AutoencoderKL.from_pretrained(output_dir / "vae"), num_scenes, device)
    captions = [scene.caption for scene in scenes(num_scenes)]
    tokens = tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids
    scheduler = DDPMScheduler(**SCHEDULE)
    torch.manual_seed(config.seed)
    unet = new_unet().to(device, memory_format=torch.channels_last)
    trainer = Trainer(unet, config, output_dir / "unet", resume=True)

    def loss_function(model, draw):
        indices = torch.tensor(draw.indices)
        caption_indices = indices.where(draw.uniform() >= 0.1, torch.tensor(num_scenes))
        with torch.no_grad():
            hidden_states = text_encoder(tokens[caption_indices].to(device)).last_hidden_state
        return unet_loss(model, scheduler, latents[indices].to(device), hidden_states, draw)

    run(trainer, loss_function, num_scenes)
    _save_ema(trainer, output_dir / "unet")


STAGES = {"vae": train_vae, "clip": train_clip, "unet": train_unet, "decoder": finetune_decoder}


# --- what is kept -----------------------------------------------------------------------------------------------------


def pipeline(output_dir: Path) -> StableDiffusionPipeline:
    """The trained networks as a plain diffusers pipeline, fp32."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(output_dir / "decoder"),
        text_encoder=CLIPTextModel.from_pretrained(output_dir / "clip", torch_dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(output_dir / "clip"),
        unet=UNet2DConditionModel.from_pretrained(output_dir / "unet"),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def export(output_dir: Path, destination: Path) -> None:
    """Writes teacher/ (the pipeline), clip/ (the judge) and logs/ in the form that data/storybook/ is committed in.

    U-Net and VAE are fp16. The text encoder stays fp32: transformers would load it in the precision it was saved in,
    and a half-precision text encoder does not fit the fp32 U-Net that diffusers loads by default.
    """
    (destination / "logs").mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        shutil.copy(output_dir / stage / "log.csv", destination / "logs" / f"{stage}.csv")
    made = pipeline(output_dir)
    made.unet.half()
    made.vae.half()
    made.save_pretrained(destination / "teacher")
    clip = CLIPModel.from_pretrained(output_dir / "clip", torch_dtype=torch.float32)
    clip.save_pretrained(destination / "clip")
    made.tokenizer.save_pretrained(destination / "clip")
    size = {"height": storybook.SIZE, "width": storybook.SIZE}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(destination / "clip")


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, num_images: int = 256) -> float:
    """Mean PSNR in dB over held-out pictures that went through the VAE and back."""
    images = to_unit(pictures(range(num_images), "test")).to(vae.device)
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3)))).mean().item()


def score(folder: Path, num_images: int = 256, device: str = "cpu") -> None:
    """Writes scores.json: how good the teacher in `folder` is on held-out captions, beside real renders of the same."""
    places = {"teacher": str(folder / "teacher"), "judge": str(folder / "clip")}
    settings = find_preset("storybook", num_images=num_images, **places)
    scorer, made = Scorer(settings, device), load_pipeline(settings.teacher, device)
    real = [storybook.render(scene, seed) for seed, scene in enumerate(scorer.scenes)]
    scores = {
        "num_images": num_images, "num_inference_steps": settings.num_inference_steps, "seed": scorer.seed,
        "guidance_scale": settings.guidance_scale, "psnr": round(reconstruction_psnr(made.vae), 2),
        "real": scorer.scores(real), "teacher": scorer.scores(scorer.draw(made)),
    }  # fmt: skip
    write_json(folder / "scores.json", scores)
    print(json.dumps(scores, indent=1))


def main() -> None:
    """Command line: the stages to run, in order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "export"])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/00_storybook_world/teacher"))
    parser.add_argument("--destination", type=Path, default=Path("data/storybook"), help="where export writes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-train-steps", type=int)
    arguments = parser.parse_args()
    changes = {k: v for k in ("batch_size", "max_train_steps") if (v := getattr(arguments, k))}
    for stage in arguments.stages:
        if stage == "export":
            export(arguments.output_dir, arguments.destination)
            score(arguments.destination, device=arguments.device)
        else:
            STAGES[stage](arguments.output_dir, replace(CONFIGS[stage], **changes), device=arguments.device)


if __name__ == "__main__":
    main()
