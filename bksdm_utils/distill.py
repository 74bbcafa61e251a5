"""Knowledge distillation from teacher to student: taps, the three losses, and what a training step minimises.

Section 3.2 of the paper:  L = λ_sd · L_Task + λ_out · L_OutKD + λ_feat · L_FeatKD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from .data import LatentDataset
from .engine import Draw
from .surgery import RemovalPlan, find_plan, layers_per_stage


def tap_pairs(plan: str | RemovalPlan, teacher_config: Mapping) -> list[tuple[str, str]]:
    """(teacher module, student module) whose outputs the feature loss compares, outermost encoder stage first.

    Every stage's output is tapped on both sides. Where the plan removes innermost stages, the student's last down stage
    no longer ends in a downsampler as the teacher's does; there the last attention's `proj_out` of both is compared.
    """
    plan = find_plan(plan)
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
    """λ_sd, λ_out and λ_feat of the paper; 1, 1, 1 there."""

    sd: float = 1.0
    kd_output: float = 1.0
    kd_feat: float = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"lambda_{name} is {value}: a loss weight must not be negative")


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
) -> KDLosses:
    """The paper's three losses, each a mean over all elements, in fp32.

    Args:
        prediction, teacher_prediction, target: (B, 4, H, W); the target is ε, or v for a v-prediction teacher.
        features: tap name -> (student's, teacher's) activation, of equal shapes.
    """
    task = F.mse_loss(prediction.float(), target.float())
    output = F.mse_loss(prediction.float(), teacher_prediction.float())
    feature = {tap: F.mse_loss(s.float(), t.float()) for tap, (s, t) in features.items()}
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


class Distillation:
    """A teacher and a student on the same noisy latents; `losses` is the engine's loss function.

    Args:
        teacher, student: U-Nets; the teacher is frozen, the student trained.
        text_encoder: frozen; token ids (B, T) -> hidden states (B, T, D).
        scheduler: the DDPM noise schedule of the teacher.
        data: latents and token ids.
        taps: what `tap_pairs` gives; none for training without feature distillation.
        weights: λ_sd, λ_out, λ_feat. With λ_feat 0 nothing is tapped, with λ_out 0 too the teacher does not run.
    """

    def __init__(
        self, teacher: UNet2DConditionModel, student, text_encoder, scheduler, data: LatentDataset, taps, weights
    ):
        self.teacher = teacher.requires_grad_(False).eval()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.scheduler, self.data, self.weights = scheduler, data, weights
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
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        self.teacher_taps.listen()
        self.student_taps.listen()
        with torch.no_grad():
            hidden_states = self.text_encoder(token_ids)[0]
            teacher_prediction = self._teacher(noisy_latents, timesteps, hidden_states)
        prediction = student(noisy_latents, timesteps, hidden_states).sample
        target = training_target(self.scheduler, latents, noise, timesteps)
        pairs = zip(self.student_taps.take(), self.teacher_taps.take(), strict=True)
        features = dict(zip(self.student_taps.names, pairs, strict=True))
        if teacher_prediction is None:
            teacher_prediction = prediction.detach()
        return kd_losses(prediction, teacher_prediction, target, features, self.weights)

    def _teacher(self, noisy_latents, timesteps, hidden_states) -> torch.Tensor | None:
        if self.weights.kd_output or self.teacher_taps.names:
            return self.teacher(noisy_latents, timesteps, hidden_states).sample
        return None

    def close(self) -> None:
        """Removes the hooks from both networks."""
        self.teacher_taps.close()
        self.student_taps.close()


@torch.no_grad()
def tap_features(unet: UNet2DConditionModel, names: Sequence[str], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Activations (B, C, H, W) of the named modules in one pass over (noisy latents, timesteps, hidden states)."""
    taps = Taps(unet, names)
    taps.listen()
    try:
        unet(*inputs)
        return taps.take()
    finally:
        taps.close()
