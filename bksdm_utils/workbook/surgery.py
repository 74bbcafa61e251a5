"""What notebooks 01 and 02 show: the U-Net as a figure, tables of costs, timings, removals, and the weight map."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from diffusers import UNet2DConditionModel
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from ..config.surgery import Budget
from ..core.copying import CopyReport, empty_unet, weight_map
from ..core.losses import prediction_distance
from ..core.plans import RemovalPlan, identity_plan, removals, resolve_plan, student_config
from ..core.surgery import build_student, random_unet
from ..costs.budget import BudgetSearch
from ..costs.counting import Costs, ModuleCosts, count
from ..costs.measuring import Latency, block_latency, interleaved_latency, peak_memory
from ..evaluation.scorer import Scorer
from ..models.pipelines import Pipeline, with_unet

KINDS = {"resnets": "resnet", "attentions": "transformer block", "samplers": "down- or upsampler"}
COLOURS = {"resnet": "#4c78a8", "transformer block": "#f2a541", "down- or upsampler": "#9aa5b1"}
REMOVED = {"facecolor": "white", "edgecolor": "#b0b7c0", "linewidth": 0.8, "linestyle": (0, (3, 2))}
MODULE = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(?:down|up)?(resnets|attentions|samplers)\.(\d+)"
                    r"(?:\.transformer_blocks\.(\d+))?")  # fmt: skip
COUNTS = {"parameters": "params", "MACs (paper's)": "macs", "MACs with attention": "macs_with_attention"}
SHARES = ("parameters", "MACs", "latency")


class Box(NamedTuple):
    """A resnet, transformer block or sampler; sorts in the order of computation."""

    arm: str  # down, mid, up
    block: int
    sampler: bool
    pair: int
    kind: str  # a resnet comes before its transformer blocks
    depth: int


def architecture(teacher_config: Mapping, *plans: str | RemovalPlan) -> Figure:
    """The teacher's U-Net and, below it, one for each plan with the removed blocks dashed.

    Data flows from left to right, down the left arm, through the mid block, up the right arm. A narrow box in a row of
    orange ones is one transformer block; height falls with the stage's resolution.
    """
    shown = [identity_plan(teacher_config), *(resolve_plan(plan, teacher_config) for plan in plans)]
    height = (0.36 * len(teacher_config["block_out_channels"]) + 0.71) * len(shown) + 0.3
    figure, axes = plt.subplots(len(shown), 1, figsize=(10.5, height), squeeze=False)
    whole = count(teacher_config)
    for axis, plan in zip(axes[:, 0], shown, strict=True):
        draw_unet(axis, teacher_config, plan)
        costs = count(student_config(teacher_config, plan))
        share = "" if plan is shown[0] else f" ({costs.params / whole.params:.0%}, {costs.macs / whole.macs:.0%})"
        title = f"{plan.name}: {short(costs.params)} parameters, {short(costs.macs)} MACs{share}"
        axis.set_title(title, fontsize=9, loc="left", pad=3)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    handles.append(Patch(**REMOVED, label="removed"))
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1))
    return figure


def short(number: float) -> str:
    """A count in full, in millions or in billions: 64, 8.69 M, 860 M, 2,990 G."""
    if number < 1e5:
        return f"{number:,}"
    value, unit = (number / 1e9, "G") if number >= 1e10 else (number / 1e6, "M")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def draw_unet(axis: Axes, config: Mapping, plan: RemovalPlan) -> None:
    """Draws the teacher's U-Net, with dashed boxes where the plan removes one, and the skip connections that stay."""
    total, x, ends = len(config["block_out_channels"]), 0.0, {}
    kept = set(_boxes(weight_map(config, plan).values()))
    for _, group in groupby(_boxes(empty_unet(config).state_dict()), lambda box: box[: 1 if box.arm == "mid" else 4]):
        boxes, left = list(group), x
        narrow = any(box.depth for box in boxes)
        row = {"down": boxes[0].block, "mid": total, "up": total - 1 - boxes[0].block}[boxes[0].arm]
        for box in boxes:
            width = 0.14 if narrow and box.kind == "transformer block" else 0.5
            height = max(0.86 * 0.82**row, 0.4) * (0.7 if box.sampler else 1)
            style = {"facecolor": COLOURS[box.kind], "edgecolor": "white", "linewidth": 0.4} if box in kept else REMOVED
            axis.add_patch(Rectangle((x, -row - height / 2), width, height, **style))
            x += width + 0.04
        if not box.sampler:
            ends[box.arm, row, boxes[0].pair] = (left, x - 0.04)
        x += 0.16
    labels = {("mid", total, 0): "mid block"}
    for stage, channels in enumerate(config["block_out_channels"]):
        labels["down", stage, 0] = "{0}×{0}\n{1} channels".format(config["sample_size"] // 2**stage, channels)
    style = {"fontsize": 6.5, "color": "#555", "ha": "right", "va": "center", "linespacing": 1.0}
    for position in labels.keys() & ends.keys():
        axis.text(ends[position][0] - 0.2, -position[1], labels[position], **style)
    for stage, pairs in enumerate(plan.stages):
        for number, (down, up) in enumerate(zip(pairs.down, reversed(pairs.up[:-1]), strict=True)):
            y = -stage + 0.1 * (number - (len(pairs.down) - 1) / 2)
            between = ends["down", stage, down][1], ends["up", stage, up][0]
            axis.plot(between, (y, y), color="#c9d1da", linewidth=1, zorder=0)
    axis.set(xlim=(-1.9, x), ylim=(-total - 0.5, 0.5))
    axis.axis("off")


def _boxes(names: Iterable[str]) -> list[Box]:
    """The boxes that tensors with these names belong to, in the order of computation."""
    boxes = set()
    for arm, block, kind, pair, depth in (match.groups() for match in map(MODULE.match, names) if match):
        if kind != "attentions" or depth:
            boxes.add(Box(arm, int(block or 0), kind == "samplers", int(pair), KINDS[kind], int(depth or 0)))
    return sorted(boxes)


def costs_table(counts: Mapping[str, Costs], whole: str = "teacher") -> pd.DataFrame:
    """Parameters and MACs of every network, and their shares of one of them."""

    def shown(costs: Costs, attribute: str) -> str:
        own = getattr(costs, attribute)
        return f"{own:,} ({own / getattr(counts[whole], attribute):.0%})"

    return pd.DataFrame({title: {name: shown(costs, attribute) for name, costs in counts.items()}
                         for title, attribute in COUNTS.items()})  # fmt: skip


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

    def budgeted(self, search: BudgetSearch, named: Mapping[str, RemovalPlan], budget: Budget | None) -> list[dict]:
        """Named plans, and plans searched within a budget or within each named plan's MACs: costs and output losses.

        A named plan that no search could find, with two pairs of a stage removed, has none beside it.
        """
        known = {name: plan for name, plan in named.items() if not math.isnan(search.predicted(plan))}
        shares = {name: search.share(plan, "macs") for name, plan in known.items()}
        budgets = {"budget": budget} if budget else {
            name: Budget("macs", math.ceil(1000 * share) / 1000) for name, share in shares.items()
        }  # fmt: skip
        plans = [("", plan) for plan in named.values()]
        plans += [(name, search.within(*budget).plan) for name, budget in budgets.items()]
        return [{"name": plan.name, "beside": beside, "plan": plan, "MACs": search.share(plan, "macs"),
                 "parameters": search.share(plan, "params"), "predicted loss": search.predicted(plan),
                 "measured loss": self.distance(plan)} for beside, plan in plans]  # fmt: skip

    @staticmethod
    def searched_lose_less(rows: Sequence[Mapping]) -> bool:
        """Whether no searched plan has a higher measured loss than the named plan it stands beside."""
        losses = {row["name"]: row["measured loss"] for row in rows}
        return all(row["measured loss"] <= losses[row["beside"]] for row in rows if row["beside"] in losses)

    def additivity(self, search: BudgetSearch, number: int = 24) -> Figure:
        """The measured output loss of plans against the sum of their removals' losses, which the search goes by."""
        chosen = search.choices[1 :: max(1, len(search.choices) // number)]
        points = [(loss, self.distance(plan)) for loss, _, plan in chosen]
        figure, axis = plt.subplots(figsize=(4.2, 3.4), layout="tight")
        axis.loglog(*zip(*points, strict=True), "o", color="#4c78a8")
        ends = [min(map(min, points)), max(map(max, points))]
        axis.plot(ends, ends, "--", color="#c9d1da", label="equal")
        axis.set(xlabel="sum of the single removals' losses", ylabel="measured loss")
        axis.legend()
        return figure

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
