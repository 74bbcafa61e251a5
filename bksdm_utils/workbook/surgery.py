"""What notebooks 01 and 02 gather: tables of costs, timings, what each removal does, and the weight map by module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from diffusers import UNet2DConditionModel
from PIL import Image

from ..core.copying import CopyReport
from ..core.losses import prediction_distance
from ..core.plans import RemovalPlan, identity_plan, removals
from ..core.surgery import build_student, random_unet
from ..costs.counting import Costs, ModuleCosts, count
from ..costs.measuring import Latency, block_latency, interleaved_latency, peak_memory
from ..evaluation.scorer import Scorer
from ..models.pipelines import Pipeline, with_unet
from .architecture import short

COUNTS = {"parameters": "params", "MACs (paper's)": "macs", "MACs with attention": "macs_with_attention"}
SHARES = ("parameters", "MACs", "latency")


def costs_table(counts: Mapping[str, Costs], whole: str = "teacher") -> pd.DataFrame:
    """Parameters and MACs of every network, and their shares of one of them."""
    rows = {}
    for name, costs in counts.items():
        exact = {title: (getattr(costs, attribute), getattr(counts[whole], attribute))
                 for title, attribute in COUNTS.items()}  # fmt: skip
        rows[name] = {title: f"{own:,} ({own / other:.0%})" for title, (own, other) in exact.items()}
    return pd.DataFrame(rows).T


def blocks_table(counts: Mapping[str, Costs]) -> pd.DataFrame:
    """Parameters and MACs of every network block by block; 0 where it has no such block."""
    nothing, blocks = ModuleCosts(0, 0, 0), next(iter(counts.values())).by_block
    return pd.DataFrame({
        (name, title): {block: short(getattr(costs.by_block.get(block, nothing), title.lower())) for block in blocks}
        for name, costs in counts.items() for title in ("params", "MACs")
    })  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Seconds and peak memory of one forward pass of each network, and seconds of the first one's blocks."""

    latency: dict[str, Latency] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, Latency] = field(default_factory=dict)

    def relative(self) -> dict[str, float]:
        """Each network's median latency as a share of the teacher's."""
        return {name: round(t.median / self.latency["teacher"].median, 4) for name, t in self.latency.items()}

    def table(self, counts: Mapping[str, Costs]) -> pd.DataFrame:
        """Latency and memory beside the counts, as shares of the teacher's."""
        whole, rows = counts["teacher"], {}
        for (name, t), share in zip(self.latency.items(), self.relative().values(), strict=True):
            own, memory = counts[name], self.memory[name]
            rows[name] = {
                "latency, of teacher": f"{share:.0%}", "MACs, of teacher": f"{own.macs / whole.macs:.0%}",
                "MACs with attention": f"{own.macs_with_attention / whole.macs_with_attention:.0%}",
                "seconds a pass": f"{t.median:.3g}", "quartiles": f"{t.low:.3g} to {t.high:.3g}",
                "peak memory, of teacher": f"{memory / self.memory['teacher']:.0%}",
                "peak memory": f"{memory / 1e9:.3f} GB",
            }  # fmt: skip
        return pd.DataFrame(rows).T

    def block_shares(self, whole: Costs) -> dict[str, dict[str, float]]:
        """Every block's share of the teacher's latency, MACs and parameters, for `bars`."""
        seconds = sum(t.median for t in self.blocks.values())
        return {name: {"share of latency": t.median / seconds,
                       "share of MACs": whole.by_block[name].macs / whole.macs,
                       "share of parameters": whole.by_block[name].params / whole.params}
                for name, t in self.blocks.items() if name in whole.by_block}  # fmt: skip


def time_networks(configs: Mapping[str, Mapping], repeats: int, device: str) -> Timing:
    """Times networks with random weights in turns, the teacher first; nothing where `repeats` is 0."""
    if not repeats:
        print("not timed: set latency_repeats (full size on a CPU: a few seconds a pass and 4 bytes a parameter)")
        return Timing()
    unets = {name: random_unet(config, device) for name, config in configs.items()}
    latency = interleaved_latency(unets, repeats)
    memory = {name: peak_memory(unet) for name, unet in unets.items()}
    return Timing(latency, memory, block_latency(unets["teacher"], min(repeats, 3)))


@dataclass(frozen=True)
class Removal:
    """A student with copied weights and no training: its images, scores, and costs as shares of the teacher's."""

    images: list[Image.Image]
    measures: dict[str, float]


class RemovalScan:
    """Measures students of one teacher on the same captions and noise.

    Args:
        probes: U-Net inputs as `probe_inputs` makes them, on which predictions are compared.
    """

    def __init__(self, pipeline: Pipeline, scorer: Scorer, probes: Sequence[Mapping]):
        self.pipeline, self.scorer, self.probes, self.whole = pipeline, scorer, probes, count(pipeline.unet)
        self.score = "CLIP score" if scorer.clip else "agreement"

    def student(self, plan: RemovalPlan) -> UNet2DConditionModel:
        return build_student(self.pipeline.unet, plan).eval()

    def distance(self, plan: RemovalPlan) -> float:
        """Mean squared distance of the student's prediction to the teacher's, on every second probe."""
        return prediction_distance(self.pipeline.unet, self.student(plan), self.probes[1::2])

    def measure(self, plan: RemovalPlan) -> Removal:
        """Samples, scores and times one student."""
        unet = self.student(plan)
        seconds = interleaved_latency({"teacher": self.pipeline.unet, "student": unet}, repeats=5)
        images, cost = self.scorer.sample(with_unet(self.pipeline, unet)), count(unet)
        distance = prediction_distance(self.pipeline.unet, unet, self.probes)
        return Removal(images, {
            "CLIP score": self.scorer.scores(images).get("clip_score", float("nan")), "distance": distance,
            "agreement": -math.log10(max(distance, 1e-12)), "parameters": cost.params / self.whole.params,
            "MACs": cost.macs / self.whole.macs, "latency": seconds["student"].median / seconds["teacher"].median,
        })  # fmt: skip

    def single(self) -> dict[str, Removal]:
        """Nothing removed, and every unit removed by itself, the smallest distance first."""
        uncut = identity_plan(self.pipeline.unet.config)
        plans = {"nothing": uncut, **removals(self.pipeline.unet.config, uncut)}
        measured = {unit: self.measure(plan) for unit, plan in plans.items()}
        return dict(sorted(measured.items(), key=lambda item: item[1].measures["distance"]))

    def savings(self, removed: Mapping[str, Removal]) -> dict[str, dict[str, float]]:
        """What each removal changes and saves, for `bars`."""
        whole, rows = removed["nothing"].measures, {}
        for unit, measures in ((unit, r.measures) for unit, r in removed.items() if unit != "nothing"):
            lost = {"CLIP score lost": whole["CLIP score"] - measures["CLIP score"]} if self.scorer.clip else {}
            saved = {f"{cost} saved": 1 - measures[cost] for cost in SHARES}
            rows[unit] = {"distance to the teacher": measures["distance"], **lost, **saved}
        return rows

    def points(self, groups: Mapping[str, Mapping[str, Removal]]) -> dict:
        """Score and costs of every group's students, for `tradeoff`."""
        return {group: {name: {key: r.measures[key] for key in (self.score, *SHARES)} for name, r in members.items()}
                for group, members in groups.items()}  # fmt: skip


def map_by_module(report: CopyReport, names: Mapping[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every tensor's source and fate, and the same counted by module."""
    tensors = pd.DataFrame(report.rows(names), columns=["student", "teacher", "what"])
    modules = tensors.assign(student=tensors.student.map(_module), teacher=tensors.teacher.map(_module))
    return tensors, modules.groupby(["teacher", "student", "what"]).size().rename("tensors").reset_index()


def _module(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:4]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]
