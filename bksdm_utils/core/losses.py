"""The three losses of section 3.2: L = λ_sd · L_Task + λ_out · L_OutKD + λ_feat · L_FeatKD (notebook 03)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from .taps import Taps


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

    def named(self) -> dict[str, torch.Tensor]:
        """As they are logged: loss, loss_task, loss_output, loss_feature and one `feature/<tap>` for each tap."""
        losses = {"loss": self.total, "loss_task": self.task, "loss_output": self.output}
        losses["loss_feature"] = sum(self.feature.values(), torch.zeros_like(self.task))
        return losses | {f"feature/{tap}": value for tap, value in self.feature.items()}


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Within it each operation computes in the precision of its inputs; the meta device knows no other way."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class _MeanSquare(torch.autograd.Function):
    """`F.mse_loss` in fp32 that keeps its inputs in their own precision for the backward pass, half of the memory."""

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(student, teacher)
        return F.mse_loss(student.float(), teacher.float())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        student, teacher = ctx.saved_tensors
        mean = 1  # as torch numbers its reductions
        return torch.ops.aten.mse_loss_backward(gradient, student.float(), teacher.float(), mean).to(student), None


def kd_losses(
    prediction: torch.Tensor, teacher_prediction: torch.Tensor, target: torch.Tensor,
    features: Mapping[str, tuple[torch.Tensor, torch.Tensor]], weights: LossWeights = LossWeights(),
    example_weights: torch.Tensor | None = None,
) -> KDLosses:  # fmt: skip
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
        feature[tap] = weights.taps.get(tap, 1.0) * _MeanSquare.apply(student, teacher) / scale
    total = weights.sd * task + weights.kd_output * output + weights.kd_feat * sum(feature.values())
    return KDLosses(task, output, feature, total)


def training_target(scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the U-Net predicts: ε, or v = √ᾱ ε - √(1-ᾱ) x₀ for a v-prediction teacher."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"the teacher predicts {kind!r}: expected epsilon or v_prediction")


def clean_latents(scheduler, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x₀ that a prediction of ε or v at `timesteps` (B,) stands for, (B, 4, H, W)."""
    alphas_cumprod = scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
    signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return signal * noisy - noise * prediction
    return (noisy - noise * prediction) / signal


@dataclass(frozen=True)
class Batch:
    """The inputs of one training step.

    Attributes:
        latents: (B, 4, H, W), scaled, of the training images.
        noise: (B, 4, H, W), standard normal.
        timesteps: (B,), whole numbers.
        token_ids: (B, T), for SDXL's two text encoders (B, 2, T).
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    token_ids: torch.Tensor


class Distillation:
    """A teacher and a student on the same noisy latents, compared at the taps and at the output.

    Args:
        teacher, student: U-Nets; the teacher is frozen, the student trained.
        conditioning: `families.TextConditioning` of the teacher's pipeline: token ids -> kwargs of the U-Nets.
        scheduler: the DDPM noise schedule of the teacher.
        taps: what `tap_pairs` gives; none for training without feature distillation.
        weights: λ_sd, λ_out, λ_feat. With λ_feat 0 nothing is tapped, with λ_out 0 too the teacher does not run.
        inert: student modules of taps that are measured but give no gradient.

    Raises:
        ValueError: `weights.taps` names an unknown tap.
    """

    def __init__(
        self, teacher: UNet2DConditionModel, student: UNet2DConditionModel, conditioning: Callable, scheduler,
        taps: Sequence[tuple[str, str]], weights: LossWeights = LossWeights(), inert: Collection[str] = (),
    ):  # fmt: skip
        self.teacher = teacher.requires_grad_(False).eval()
        self.conditioning, self.scheduler, self.weights, self.inert = conditioning, scheduler, weights, inert
        unknown = sorted(set(weights.taps) - {student for _, student in taps})
        if unknown:
            raise ValueError(f"weights for unknown taps {unknown}: expected some of {[s for _, s in taps]}")
        taps = taps if weights.kd_feat else []
        self.teacher_taps = Taps(teacher, [t for t, _ in taps])
        self.student_taps = Taps(student, [s for _, s in taps])

    def losses(self, student: nn.Module, batch: Batch) -> KDLosses:
        """The losses of one batch; `student` may be a wrapper around the tapped network."""
        noisy_latents = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        self.teacher_taps.listen()
        self.student_taps.listen()
        teacher_prediction = None
        # The frozen networks compute in the precision of their weights: autocast would only cast to and fro.
        with torch.no_grad(), no_autocast(noisy_latents.device):
            kwargs = self.conditioning(batch.token_ids)
            if self.weights.kd_output or self.teacher_taps.names:
                sample = noisy_latents.to(self.teacher.dtype)
                teacher_prediction = self.teacher(sample, batch.timesteps, **kwargs).sample
        prediction = student(noisy_latents, batch.timesteps, **kwargs).sample
        if teacher_prediction is None:
            teacher_prediction = prediction.detach()
        target = training_target(self.scheduler, batch.latents, batch.noise, batch.timesteps)
        taps = zip(self.student_taps.names, self.student_taps.take(), self.teacher_taps.take(), strict=True)
        features = {name: (own.detach() if name in self.inert else own, teacher) for name, own, teacher in taps}
        gamma = self.weights.min_snr_gamma
        example_weights = min_snr_weights(self.scheduler, batch.timesteps, gamma) if gamma else None
        return kd_losses(prediction, teacher_prediction, target, features, self.weights, example_weights)

    def close(self) -> None:
        """Removes the hooks from both networks."""
        self.teacher_taps.close()
        self.student_taps.close()


@torch.no_grad()
def prediction_distance(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, inputs: Sequence[Mapping]
) -> float:
    """Mean squared distance between the predictions of both for several kwargs: L_OutKD before any training."""
    distances = [F.mse_loss(student(**i).sample.float(), teacher(**i).sample.float()).item() for i in inputs]
    return sum(distances) / len(distances)
