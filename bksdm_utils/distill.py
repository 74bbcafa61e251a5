"""Knowledge distillation from teacher to student: taps, the three losses, and what a training step minimises.

Section 3.2 of the paper:  L = λ_sd · L_Task + λ_out · L_OutKD + λ_feat · L_FeatKD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import nn

from .copying import source_of
from .data import to_pixels
from .engine import Draw
from .latents import LatentDataset, StreamedDataset, posterior, token_ids
from .surgery import RemovalPlan, attention_depths, find_plan, layers_per_stage

KD_KINDS = ("block", "self_attention")


def tap_pairs(plan: str | RemovalPlan, teacher_config: Mapping, kd: str = "block") -> list[tuple[str, str]]:
    """(teacher module, student module) whose outputs the feature loss compares, outermost encoder stage first.

    Args:
        kd: "block" taps the end of every stage, as BK-SDM does (section 3.2). "self_attention" taps, as KOALA does
            (arXiv 2312.04005), the self-attention of every transformer block that stayed, beside the same block of the
            teacher, and the end of those stages that have no attention.

    Where the plan removes innermost stages, the student's last down stage no longer ends in a downsampler as the
    teacher's does; there the last attention's `proj_out` of both is compared.

    Raises:
        ValueError: `kd` is none of the two, or the plan is unknown.
    """
    if kd not in KD_KINDS:
        raise ValueError(f"kd is {kd!r}: expected one of {', '.join(KD_KINDS)}")
    plan = find_plan(plan)
    pairs = _block_taps(plan, teacher_config)
    return pairs if kd == "block" else _self_attention_taps(plan, teacher_config, pairs)


def _self_attention_taps(plan: RemovalPlan, teacher_config: Mapping, block_taps: Sequence) -> list[tuple[str, str]]:
    kept, depths, taps = len(plan.stages), attention_depths(teacher_config), []
    places = [("down", i, i) for i in range(kept)] + [("up", i, kept - 1 - i) for i in range(kept)]
    for (side, block, stage), block_tap in zip(places, block_taps, strict=True):
        if "CrossAttn" not in teacher_config[f"{side}_block_types"][stage if side == "down" else -1 - stage]:
            taps.append(block_tap)
            continue
        for attention in range(len(getattr(plan.stages[stage], side))):
            for depth in range(plan.stages[stage].depth or depths[stage]):
                name = f"{side}_blocks.{block}.attentions.{attention}.transformer_blocks.{depth}.attn1"
                taps.append((source_of(name, plan, len(depths)), name))
    return taps


def _block_taps(plan: RemovalPlan, teacher_config: Mapping) -> list[tuple[str, str]]:
    total, kept = len(teacher_config["block_out_channels"]), len(plan.stages)
    pairs = [(f"down_blocks.{s}", f"down_blocks.{s}") for s in range(kept)]
    if kept < total:
        last = kept - 1
        layers = layers_per_stage(teacher_config)[last]
        kind = "attentions.{}.proj_out" if "CrossAttn" in teacher_config["down_block_types"][last] else "resnets.{}"
        student_last = len(plan.stages[last].down) - 1
        pairs[last] = tuple(f"down_blocks.{last}." + kind.format(n) for n in (layers - 1, student_last))
    return pairs + [(f"up_blocks.{u + total - kept}", f"up_blocks.{u}") for u in range(kept)]


class Taps:
    """Keeps the outputs of named modules of one model, from `listen` until `take`.

    Modules are held by reference, so wrapping the model later does not lose them. Passes outside of `listen` … `take`
    leave no trace: neither a validation's drawing nor the second pass of gradient checkpointing, whose outputs carry
    no gradient.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names, self._outputs = list(names), None
        self._handles = [model.get_submodule(n).register_forward_hook(self._keeper(n)) for n in self.names]

    def _keeper(self, name: str):
        def hook(_module, _inputs, output) -> None:
            if self._outputs is not None:
                self._outputs[name] = output[0] if isinstance(output, tuple) else output  # no skip tuple

        return hook

    def listen(self) -> None:
        """From here on outputs are kept, the latest of each module."""
        self._outputs = {}

    def take(self) -> list[torch.Tensor]:
        """The outputs in the order of `names`; they are released here, and no further ones are kept."""
        outputs, self._outputs = self._outputs, None
        return [outputs[name] for name in self.names]

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class LossWeights:
    """λ_sd, λ_out and λ_feat of the paper, 1, 1, 1 there; the rest goes beyond it and is off.

    Attributes:
        normalise: divides each tap's loss by the teacher's mean square there, so that all taps weigh alike.
        taps: a factor for taps by the student's module name; others have 1.
        min_snr_gamma: γ of min-SNR weighting of the task loss (arXiv 2303.09556); 0 weighs all timesteps alike.
    """

    sd: float = 1.0
    kd_output: float = 1.0
    kd_feat: float = 1.0
    normalise: bool = False
    taps: Mapping[str, float] = field(default_factory=dict)
    min_snr_gamma: float = 0.0

    def __post_init__(self):
        numbers = {"lambda_sd": self.sd, "lambda_kd_output": self.kd_output, "lambda_kd_feat": self.kd_feat,
                   "min_snr_gamma": self.min_snr_gamma, **self.taps}  # fmt: skip
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"{name} is {value}: a loss weight must not be negative")


@dataclass(frozen=True)
class Augmentation:
    """What a training step does to captions and noise beyond the paper; all off by default.

    Attributes:
        caption_dropout: probability of the empty caption instead of the picture's.
        random_conditioning: λ of `random_conditioning_probability`; 0 keeps every caption with its picture.
        noise_offset: strength of a shift common to all pixels of a channel, added to the noise.
    """

    caption_dropout: float = 0.0
    random_conditioning: float = 0.0
    noise_offset: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0 or (name == "caption_dropout" and value > 1):
                raise ValueError(f"{name} is {value}: expected zero or more, a probability at most 1")


def random_conditioning_probability(timesteps: torch.Tensor, num_train_timesteps: int, rate: float) -> torch.Tensor:
    """Probability that a caption is replaced by an unrelated one (arXiv 2504.02011): e^(-λ min(t/T, 1 - t/T)).

    High at both ends: near pure noise a picture says nothing about its caption, near the clean one the caption adds
    nothing to the picture. The teacher answers for any caption, so the student sees far more of them than pictures.
    """
    share = timesteps / num_train_timesteps
    return torch.exp(-rate * torch.minimum(share, 1 - share))


def min_snr_weights(scheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of each example's task loss, (B,): min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v."""
    snr = compute_snr(scheduler, timesteps)
    return snr.clamp(max=gamma) / (snr + (scheduler.config.prediction_type == "v_prediction"))


@dataclass(frozen=True)
class KDLosses:
    """The losses of one batch, each a scalar; `feature` has one per tap."""

    task: torch.Tensor
    output: torch.Tensor
    feature: dict[str, torch.Tensor]
    total: torch.Tensor


def kd_losses(
    prediction: torch.Tensor,
    teacher_prediction: torch.Tensor,
    target: torch.Tensor,
    features: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    weights: LossWeights = LossWeights(),
    example_weights: torch.Tensor | None = None,
) -> KDLosses:
    """The paper's three losses, each a mean over all elements, in fp32.

    Args:
        prediction, teacher_prediction, target: (B, 4, H, W); the target is ε, or v for a v-prediction teacher.
        features: tap name -> (student's, teacher's) activation, of equal shapes.
        example_weights: (B,), of the task loss.
    """
    task = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
    task = (task if example_weights is None else task * example_weights).mean()
    output = F.mse_loss(prediction.float(), teacher_prediction.float())
    feature = {}
    for tap, (student, teacher) in features.items():
        scale = teacher.float().square().mean().clamp(min=1e-12) if weights.normalise else 1.0
        feature[tap] = weights.taps.get(tap, 1.0) * F.mse_loss(student.float(), teacher.float()) / scale
    total = weights.sd * task + weights.kd_output * output + weights.kd_feat * sum(feature.values())
    return KDLosses(task, output, feature, total)


def training_target(scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the U-Net is asked to predict: ε, or v = √ᾱ ε - √(1-ᾱ) x₀ for a v-prediction teacher."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"the teacher predicts {kind!r}: expected epsilon or v_prediction")


class TextCondition:
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


class Distillation:
    """A teacher and a student on the same noisy latents; `losses` is the engine's loss function.

    Args:
        teacher, student: U-Nets; the teacher is frozen, the student trained.
        condition: `TextCondition` of the teacher's pipeline: token ids -> the U-Nets' further arguments.
        scheduler: the DDPM noise schedule of the teacher.
        data: latents and token ids.
        taps: what `tap_pairs` gives; none for training without feature distillation.
        weights: λ_sd, λ_out, λ_feat. With λ_feat 0 nothing is tapped, with λ_out 0 too the teacher does not run.
        augmentation: what is done to captions and noise.

    Raises:
        ValueError: `weights.taps` names a tap that there is not.
    """

    def __init__(
        self, teacher: UNet2DConditionModel, student, condition, scheduler,
        data: LatentDataset | StreamedDataset, taps, weights,
        augmentation: Augmentation = Augmentation(),
    ):  # fmt: skip
        self.teacher = teacher.requires_grad_(False).eval()
        self.condition, self.scheduler, self.data, self.weights = condition, scheduler, data, weights
        self.augmentation = augmentation
        unknown = sorted(set(weights.taps) - {student for _, student in taps})
        if unknown:
            raise ValueError(f"weights for unknown taps {unknown}: expected some of {[s for _, s in taps]}")
        taps = taps if weights.kd_feat else []
        self.teacher_taps = Taps(teacher, [t for t, _ in taps])
        self.student_taps = Taps(student, [s for _, s in taps])

    def losses(self, student: nn.Module, draw: Draw) -> dict[str, torch.Tensor]:
        """One micro-batch: loss, loss_task, loss_output, loss_feature and one `feature/<tap>` for each tap."""
        kd = self.kd_losses(student, draw)
        losses = {"loss": kd.total, "loss_task": kd.task, "loss_output": kd.output}
        losses["loss_feature"] = sum(kd.feature.values(), torch.zeros_like(kd.task))
        return losses | {f"feature/{tap}": value for tap, value in kd.feature.items()}

    def kd_losses(self, student: nn.Module, draw: Draw) -> KDLosses:
        """`losses` before they are named for the log."""
        latents, token_ids = self.data.batch(draw, self.teacher.device)
        noise = draw.normal(*latents.shape[1:]).to(latents)
        timesteps = draw.integers(self.scheduler.config.num_train_timesteps).to(latents.device)
        noise, token_ids = self._augmented(draw, noise, token_ids, timesteps)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        self.teacher_taps.listen()
        self.student_taps.listen()
        with torch.no_grad():
            condition = self.condition(token_ids)
            teacher_prediction = self._teacher(noisy_latents, timesteps, condition)
        prediction = student(noisy_latents, timesteps, **condition).sample
        target = training_target(self.scheduler, latents, noise, timesteps)
        pairs = zip(self.student_taps.take(), self.teacher_taps.take(), strict=True)
        features = dict(zip(self.student_taps.names, pairs, strict=True))
        if teacher_prediction is None:
            teacher_prediction = prediction.detach()
        gamma = self.weights.min_snr_gamma
        example_weights = min_snr_weights(self.scheduler, timesteps, gamma) if gamma else None
        return kd_losses(prediction, teacher_prediction, target, features, self.weights, example_weights)

    def _augmented(self, draw: Draw, noise, token_ids, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and token ids after `augmentation`; what is off draws no random number, so it changes no other."""
        chosen = self.augmentation
        if chosen.noise_offset:
            noise = noise + chosen.noise_offset * draw.normal(noise.shape[1], 1, 1).to(noise)
        if chosen.random_conditioning:
            total = self.scheduler.config.num_train_timesteps
            probability = random_conditioning_probability(timesteps.cpu(), total, chosen.random_conditioning)
            others, replaced = self.data.other_token_ids(draw), draw.uniform() < probability
            token_ids = _where(replaced, others, token_ids)
        if chosen.caption_dropout:
            token_ids = _where(draw.uniform() < chosen.caption_dropout, self.data.empty_ids, token_ids)
        return noise, token_ids

    def _teacher(self, noisy_latents, timesteps, condition: dict) -> torch.Tensor | None:
        if self.weights.kd_output or self.teacher_taps.names:
            return self.teacher(noisy_latents, timesteps, **condition).sample
        return None

    def close(self) -> None:
        """Removes the hooks from both networks."""
        self.teacher_taps.close()
        self.student_taps.close()


def _where(chosen: torch.Tensor, ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    chosen = chosen.view(-1, *[1] * (others.ndim - 1)).to(others.device)
    return torch.where(chosen, ids.to(others.device), others)


@torch.no_grad()
def tap_features(unet: UNet2DConditionModel, names: Sequence[str], **inputs) -> list[torch.Tensor]:
    """Activations (B, C, H, W), of self-attention (B, HW, C), of the named modules in one pass over `inputs`."""
    taps = Taps(unet, names)
    taps.listen()
    try:
        unet(**_in_precision(inputs, unet.dtype))
        return taps.take()
    finally:
        taps.close()


def _in_precision(inputs: Mapping, dtype: torch.dtype) -> dict:
    """The same U-Net arguments with every floating-point tensor in `dtype`; timesteps stay whole numbers."""
    changed = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            changed[name] = _in_precision(value, dtype)
        else:
            changed[name] = value.to(dtype) if value.is_floating_point() else value
    return changed


@torch.no_grad()
def probe_inputs(
    pipeline: DiffusionPipeline, pictures: Sequence[Image.Image], captions: Sequence[str], seed: int = 0,
    timesteps: Sequence[int] = (100, 300, 500, 700, 900),
) -> list[dict]:  # fmt: skip
    """U-Net arguments to compare networks on: pictures as latents, each noised to every timestep, with its caption."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    latents, _ = posterior(pipeline, torch.stack([to_pixels(picture, side) for picture in pictures]))
    condition = TextCondition(pipeline)(token_ids(pipeline, captions).to(latents.device))
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    generator, inputs = torch.Generator().manual_seed(seed), []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps = torch.full((len(latents),), timestep, device=latents.device)
        inputs.append({"sample": schedule.add_noise(latents, noise, steps), "timestep": steps, **condition})
    return inputs


@torch.no_grad()
def prediction_distance(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, inputs: Sequence[Mapping]
) -> float:
    """Mean squared distance between the predictions of both on `probe_inputs`: L_OutKD before any training."""
    distances = [F.mse_loss(student(**i).sample.float(), teacher(**i).sample.float()).item() for i in inputs]
    return sum(distances) / len(distances)


if __name__ == "__main__":  # accelerate launch -m bksdm_utils.distill --config FOLDER/config.json
    from .training import main

    raise SystemExit(main())
