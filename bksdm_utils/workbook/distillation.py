"""What notebook 03 looks at: features of both networks on one batch, and short runs that differ in one thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..core.taps import tap_features
from ..models.devices import to_device
from ..training.job import KDJob, short_run
from ..training.rng import BatchRng

MOST_MAPS = 12  # columns of a figure of feature maps

PAPER = {
    "random weights, task loss alone": {"copied": False, "lambda_kd_output": 0.0, "lambda_kd_feat": 0.0},
    "random weights, all three losses": {"copied": False},
    "copied weights, task loss alone": {"lambda_kd_output": 0.0, "lambda_kd_feat": 0.0},
    "copied weights, all three losses": {},
}
BEYOND = {
    "task and output, no features": {"lambda_kd_feat": 0.0},
    "normalised features": {"normalise_features": True},
    "self-attention taps": {"kd": "self_attention"},
    "min-SNR, γ 5": {"min_snr_gamma": 5.0},
    "caption dropout 0.1": {"caption_dropout": 0.1},
    "random conditioning, λ 5": {"random_conditioning": 5.0},
    "noise offset 0.1": {"noise_offset": 0.1},
}
ABLATIONS = {"paper": PAPER, "all": PAPER | BEYOND}


class FeatureProbe:
    """Activations at the taps of a run, for the same images and noise at any timestep.

    Args:
        job: the prepared run, whose first training images are used.
    """

    def __init__(self, job: KDJob, seed: int, num_images: int = 4):
        self.job, device = job, job.pipe.device
        rng = BatchRng(seed, 0, range(num_images), num_images, job.data.num_examples)
        self.latents, ids = (to_device(values, device) for values in job.data.batch(rng))
        self.kwargs = job.conditioning(ids)
        self.noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        self.teacher_taps, self.student_taps = ([pair[side] for pair in job.pairs] for side in (0, 1))
        self.columns = slice(None, None, -(-len(job.pairs) // MOST_MAPS))

    @property
    def titles(self) -> list[str]:
        """Short names of the taps that `maps` has."""
        names = self.student_taps[self.columns]
        return [n.replace(".transformer_blocks", "\nblock").replace(".attentions", "\nattn") for n in names]

    def features(self, unet, taps: Sequence[str], timestep: int) -> list[torch.Tensor]:
        """Activations (B, C, H, W), of self-attention (B, HW, C), of the named modules."""
        timesteps = torch.full((len(self.latents),), timestep, device=self.latents.device)
        noisy = self.job.noise_schedule.add_noise(self.latents, self.noise, timesteps)
        return tap_features(unet, taps, sample=noisy, timestep=timesteps, **self.kwargs)

    def maps(self, name: str, unet, timesteps: Iterable[int]) -> dict[str, list[torch.Tensor]]:
        """A row of the figure for each timestep: the first image's activations."""
        taps = self.teacher_taps if unet is self.job.pipe.unet else self.student_taps
        return {f"{name}\nt={t}": [f[0].cpu() for f in self.features(unet, taps, t)[self.columns]] for t in timesteps}

    def shapes(self, student) -> pd.DataFrame:
        """Teacher's and student's taps and the shapes of their activations, which must agree."""
        pairs = zip(self.features(self.job.pipe.unet, self.teacher_taps, 500),
                    self.features(student, self.student_taps, 500), strict=True)  # fmt: skip
        rows = [(*names, str(tuple(a.shape[1:])), str(tuple(b.shape[1:])))
                for names, (a, b) in zip(self.job.pairs, pairs, strict=True)]  # fmt: skip
        return pd.DataFrame(rows, columns=["teacher", "student", "teacher's shape", "student's shape"])


def ablate(job: KDJob, settings: Mapping[str, Mapping], steps: int, seeds: Iterable[int]) -> list[dict]:
    """Short runs of every setting with every seed: rows of setting, seed and validation scores."""
    return [{"setting": name, "seed": seed, **short_run(job, steps, seed, **changes)}
            for seed in seeds for name, changes in settings.items()]  # fmt: skip


def ablation_table(rows: Sequence[Mapping], score: str = "clip_score") -> pd.DataFrame:
    """Mean, lowest and highest score over the seeds of each setting, in order."""
    return pd.DataFrame(rows).groupby("setting", sort=False)[score].agg(["mean", "min", "max"])


def ablation_figure(table: pd.DataFrame, teacher: float, xlabel: str) -> Figure:
    """A dot for each setting's mean, bars from its lowest to its highest seed, the teacher as a dashed line."""
    figure, axis = plt.subplots(figsize=(6.4, 0.8 + 0.3 * len(table)))
    reach = [table["mean"] - table["min"], table["max"] - table["mean"]]
    axis.errorbar(table["mean"], range(len(table)), xerr=reach, fmt="o", capsize=3, color="#4c78a8")
    axis.axvline(teacher, linestyle="--", color="grey", label="teacher")
    axis.set(yticks=range(len(table)), yticklabels=table.index, xlabel=xlabel)
    axis.invert_yaxis()
    axis.legend()
    figure.tight_layout()
    return figure
