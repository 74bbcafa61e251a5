"""Which blocks go: a `RemovalPlan`, the named variants, and the student config they lead to (notebook 01).

Section 3.1 of the paper. A U-Net has stages, numbered from the outermost (full resolution) inwards; each holds
(resnet, attention) pairs on its way down, one pair more on its way up, and the mid block joins the two innermost ends.
An attention holds one transformer block in Stable Diffusion v1 and v2, up to ten in SDXL: its depth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, product, zip_longest
from operator import itemgetter

PER_STAGE = ("block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim", "num_attention_heads",
             "cross_attention_dim", "only_cross_attention", "transformer_layers_per_block")  # fmt: skip
STRICT = {"extra": "forbid", "strict": True}  # how pydantic reads plans from files; see config/plan_files.py


@dataclass(frozen=True)
class Stage:
    """The pairs that stay in one stage, by their number in the teacher: `down` on the way in, `up` on the way out.

    `depth` is the number of transformer blocks that stay in each of its attentions, the first ones; None keeps all.
    """

    __pydantic_config__ = STRICT
    down: tuple[int, ...]
    up: tuple[int, ...]
    depth: int | None = None


@dataclass(frozen=True)
class RemovalPlan:
    """What a student keeps of its teacher.

    Attributes:
        name: a short name for folders and tables.
        stages: outermost first; fewer than the teacher has removes the innermost ones on both sides.
        mid: whether the mid block stays; its attention is as deep as the innermost stage's.
    """

    __pydantic_config__ = STRICT
    name: str
    stages: tuple[Stage, ...]
    mid: bool = True

    def describe(self, teacher_config: Mapping) -> str:
        """What stays of this teacher, one line for each run of equal stages.

        Raises:
            ValueError: the plan does not fit the teacher.
        """
        self.check(teacher_config)
        lines, total = [self.name], len(teacher_config["block_out_channels"])
        stages = enumerate(zip(self.stages, layers_per_stage(teacher_config), strict=False))
        for (stage, layers), group in groupby(stages, key=itemgetter(1)):
            numbers = [number for number, _ in group]
            title = f"stage {numbers[0]}" if len(numbers) == 1 else f"stages {numbers[0]} to {numbers[-1]}"
            down, up = (", ".join(map(str, pairs)) for pairs in (stage.down, stage.up))
            depth = f", the first {stage.depth} transformer blocks of each attention" if stage.depth else ""
            lines.append(f"  {title}: keep pair {down} of {layers} down, pairs {up} of {layers + 1} up{depth}")
        if len(self.stages) < total:
            lines.append(f"  innermost stages removed: {total - len(self.stages)}")
        return "\n".join([*lines, f"  mid block: {'kept' if self.mid else 'removed'}"])

    def to_json(self) -> str:
        """The plan as JSON; `config.plan_files.read_plan` reads it."""
        return json.dumps(asdict(self))

    def check(self, teacher_config: Mapping) -> None:
        """Raises ValueError, saying which rule is broken, if no student of this teacher can follow the plan."""
        check_unet(teacher_config)
        widths, kept = list(teacher_config["block_out_channels"]), len(self.stages)
        if not 1 <= kept <= len(widths):
            raise ValueError(f"plan {self.name!r} has {kept} stages, the teacher {len(widths)}: keep between 1 and "
                             f"{len(widths)} (named_plans(teacher_config) has those that fit)")  # fmt: skip
        if kept < len(widths) and widths[kept - 1] != widths[kept]:
            raise ValueError(
                f"plan {self.name!r} removes the innermost {len(widths) - kept} stages, but the teacher's stage "
                f"{kept - 1} has {widths[kept - 1]} channels and stage {kept} {widths[kept]}: the decoder's weights "
                f"would not fit. Remove only stages as wide as the one that becomes innermost."
            )
        for number, stage in enumerate(self.stages):
            _check_stage(stage, f"plan {self.name!r}, stage {number}", teacher_config, number)
        if self.mid:
            _check_mid(self, teacher_config)


def _check_stage(stage: Stage, where: str, config: Mapping, number: int) -> None:
    layers, depth = layers_per_stage(config)[number], attention_depths(config)[number]
    for side, pairs, available in (("down", stage.down, layers), ("up", stage.up, layers + 1)):
        if list(pairs) != sorted(set(pairs)) or not set(pairs) <= set(range(available)):
            raise ValueError(f"{where}: {side}={pairs} must be rising numbers among 0 … {available - 1}")
    if not stage.down:
        raise ValueError(f"{where}: down={stage.down} keeps no pair; keep one, or remove the innermost stages whole")
    if len(stage.up) != len(stage.down) + 1:
        raise ValueError(f"{where}: {len(stage.down)} pairs down need {len(stage.down) + 1} up, not {len(stage.up)}: "
                         "every skip connection needs both its ends")  # fmt: skip
    if stage.depth is not None and not 1 <= stage.depth <= depth:
        raise ValueError(f"{where}: depth {stage.depth} must be 1 … {depth}")
    student, teacher = (_input_channels(config, number, count) for count in (len(stage.down), layers))
    for side, pairs in (("down", stage.down), ("up", stage.up)):
        for position, pair in enumerate(pairs):
            given, needed = student[side][position], teacher[side][pair]
            if given != needed:
                raise ValueError(f"{where}: {side} pair {pair} cannot be number {position} in the student, where it "
                                 f"gets {given} input channels; its weights need {needed}")  # fmt: skip


def _input_channels(config: Mapping, stage: int, layers: int) -> dict[str, list]:
    """Channels that each pair of a stage with `layers` pairs gets: down; up, from below and by its skip connection."""
    widths = config["block_out_channels"]
    outer, own, inner = widths[max(stage - 1, 0)], widths[stage], widths[min(stage + 1, len(widths) - 1)]
    below, skip = [inner] + [own] * layers, [own] * layers + [outer]
    return {"down": [outer] + [own] * (layers - 1), "up": list(zip(below, skip, strict=True))}


def _check_mid(plan: RemovalPlan, teacher_config: Mapping) -> None:
    if teacher_config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None:
        raise ValueError(f"plan {plan.name!r} keeps the mid block, but the teacher has none: give mid=False")
    inner, widths, depths = len(plan.stages) - 1, teacher_config["block_out_channels"], attention_depths(teacher_config)
    heads, depth = teacher_config.get("attention_head_dim", 8), plan.stages[inner].depth or depths[inner]
    if widths[inner] != widths[-1] or depth > depths[-1]:
        raise ValueError(
            f"plan {plan.name!r} keeps the mid block of {widths[-1]} channels and depth {depths[-1]} under stage "
            f"{inner} of {widths[inner]} channels and depth {depth}: remove the mid block too"
        )
    if isinstance(heads, (list, tuple)) and heads[inner] != heads[-1]:
        raise ValueError(
            f"plan {plan.name!r} keeps the mid block, whose attention has {heads[-1]} heads, under stage {inner} "
            f"with {heads[inner]}: the student's mid block would compute something else. Remove it too."
        )


def paper_plan(
    teacher_config: Mapping, name: str, *, mid: bool = True, innermost: bool = True, depths: Sequence[int | None] = ()
) -> RemovalPlan:
    """The paper's rule: of every stage the second pairs go; where asked also the mid block and the innermost stage.

    Each stage keeps its first pair on the way down, and its first and last on the way up.

    Args:
        mid, innermost: whether the mid block and the innermost stage stay.
        depths: transformer blocks that stay in each stage's attentions, as in KOALA; None keeps all.
    """
    count = len(teacher_config["block_out_channels"])
    kept = free_plan(teacher_config, range(count), mid, count if innermost else count - 1, name)
    stages = zip_longest(kept.stages, depths[: len(kept.stages)])
    return replace(kept, mid=mid, stages=tuple(replace(stage, depth=depth) for stage, depth in stages))


Rule = Callable[[Mapping], RemovalPlan]  # of a teacher's config
SD_VARIANTS: dict[str, Rule] = {
    "bk_base": partial(paper_plan, name="bk_base"),
    "bk_small": partial(paper_plan, name="bk_small", mid=False),
    "bk_tiny": partial(paper_plan, name="bk_tiny", mid=False, innermost=False),
}
SDXL_VARIANTS: dict[str, Rule] = {
    "bk_sdxl_base": partial(paper_plan, name="bk_sdxl_base"),
    "bk_sdxl_small": partial(paper_plan, name="bk_sdxl_small", mid=False),
    "koala_1b": partial(paper_plan, name="koala_1b", depths=(None, None, 6)),
    "koala_700m": partial(paper_plan, name="koala_700m", mid=False, depths=(None, None, 5)),
}
VARIANTS: dict[str, Rule] = SD_VARIANTS | SDXL_VARIANTS
FAMILY_VARIANTS = {"text_time": SDXL_VARIANTS}  # by the U-Net's addition_embed_type; other families have SD's
ALIASES = {"sd_small": "bk_base", "sd_tiny": "bk_tiny"}  # segmind/distill-sd's names for the same plans


def named_plans(teacher_config: Mapping) -> dict[str, RemovalPlan]:
    """The named plans made for a teacher of this family that fit it."""
    rules = FAMILY_VARIANTS.get(teacher_config.get("addition_embed_type"), SD_VARIANTS)
    plans = {name: rule(teacher_config) for name, rule in rules.items()}
    return {name: plan for name, plan in plans.items() if fits(plan, teacher_config)}


def check_variant(name: str) -> str:
    """A variant's own name, for an alias the name it stands for.

    Raises:
        ValueError: the name is unknown.
    """
    if ALIASES.get(name, name) not in VARIANTS:
        same = ", ".join(f"{alias} (the same as {own})" for alias, own in ALIASES.items())
        raise ValueError(f"unknown variant {name!r}: expected one of {', '.join(VARIANTS)}, {same}, or a .json file")
    return ALIASES.get(name, name)


def resolve_plan(plan: str | RemovalPlan, teacher_config: Mapping) -> RemovalPlan:
    """A plan by its name in `VARIANTS` or `ALIASES`, or itself."""
    return plan if isinstance(plan, RemovalPlan) else VARIANTS[check_variant(plan)](teacher_config)


def fits(plan: RemovalPlan, teacher_config: Mapping) -> bool:
    """Whether a student of this teacher can follow the plan."""
    try:
        plan.check(teacher_config)
    except ValueError:
        return False
    return True


def identity_plan(teacher_config: Mapping) -> RemovalPlan:
    """The plan that removes nothing."""
    check_unet(teacher_config)
    stages = tuple(Stage(tuple(range(n)), tuple(range(n + 1))) for n in layers_per_stage(teacher_config))
    return RemovalPlan("teacher", stages, mid=teacher_config.get("mid_block_type", "") is not None)


def free_plan(
    teacher_config: Mapping, thin: Sequence[int] = (), mid: bool = True, stages: int | None = None,
    name: str = "own plan",
) -> RemovalPlan:  # fmt: skip
    """A plan by what it removes.

    Args:
        thin: stages that keep their first pair down, and their first and last up, as the paper's students do.
        mid: whether the mid block stays.
        stages: how many stages stay, counted from the outermost; all of them by default.
    """
    whole = identity_plan(teacher_config)
    thinned = [Stage(s.down[:1], (s.up[0], s.up[-1])) if i in thin else s for i, s in enumerate(whole.stages)]
    return RemovalPlan(name, tuple(thinned[:stages]), mid and whole.mid)


def removals(teacher_config: Mapping, plan: RemovalPlan) -> dict[str, RemovalPlan]:
    """Every plan that removes one unit more than `plan`, by what that unit is.

    A unit is a pair on the way down together with one on the way up (each skip connection needs both its ends), the mid
    block, the innermost stage, or the last transformer block of every attention in a stage. Only plans that fit are
    given.
    """
    depths, plans = attention_depths(teacher_config), {}
    for number, stage in enumerate(plan.stages):
        for down, up in product(stage.down, stage.up):
            kept = {"down": tuple(p for p in stage.down if p != down), "up": tuple(p for p in stage.up if p != up)}
            plans[f"stage {number}: down {down}, up {up}"] = _changed(plan, number, **kept)
        depth = stage.depth or depths[number]
        if depth > 1 and "CrossAttn" in teacher_config["down_block_types"][number]:
            plans[f"stage {number}: depth {depth} to {depth - 1}"] = _changed(plan, number, depth=depth - 1)
    if plan.mid:
        plans["mid block"] = replace(plan, mid=False)
    plans["innermost stage"] = replace(plan, stages=plan.stages[:-1])
    return {unit: replace(p, name=f"without {unit}") for unit, p in plans.items() if fits(p, teacher_config)}


def _changed(plan: RemovalPlan, number: int, **fields) -> RemovalPlan:
    stages = list(plan.stages)
    stages[number] = replace(stages[number], **fields)
    return replace(plan, stages=tuple(stages))


def layers_per_stage(config: Mapping) -> list[int]:
    """Number of (resnet, attention) pairs in each down stage."""
    layers = config["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)


def attention_depths(config: Mapping) -> list[int]:
    """Number of transformer blocks in each attention, stage by stage.

    Raises:
        ValueError: the attentions of one stage differ in depth, which no plan can say yet.
    """
    depths = config.get("transformer_layers_per_block") or 1
    if isinstance(depths, int):
        return [depths] * len(config["block_out_channels"])
    flat = [set(depth) if isinstance(depth, (list, tuple)) else {depth} for depth in depths]
    if config.get("reverse_transformer_layers_per_block") or any(len(depth) != 1 for depth in flat):
        raise ValueError("the attentions within one stage differ in depth: expected one depth for each stage")
    return [depth.pop() for depth in flat]


def student_config(teacher_config: Mapping, plan: str | RemovalPlan) -> dict:
    """The student's U-Net config: plain diffusers, `UNet2DConditionModel.from_config` and `from_pretrained` take it.

    Raises:
        ValueError: the plan is unknown or does not fit the teacher, or the teacher is not Stable-Diffusion-shaped.
    """
    plan = resolve_plan(plan, teacher_config)
    plan.check(teacher_config)
    kept = len(plan.stages)
    config = {k: v for k, v in teacher_config.items() if not k.startswith("_")}
    for key in PER_STAGE:
        if isinstance(config.get(key), (list, tuple)):
            config[key] = list(config[key])[:kept]
    config["up_block_types"] = list(config["up_block_types"])[-kept:]
    layers = [len(stage.down) for stage in plan.stages]
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    if any(stage.depth for stage in plan.stages):
        depths = attention_depths(teacher_config)
        config["transformer_layers_per_block"] = [s.depth or d for s, d in zip(plan.stages, depths, strict=False)]
    if not plan.mid:
        config["mid_block_type"] = None
    return config


def check_unet(config: Mapping) -> None:
    """Raises ValueError for a config that is no Stable-Diffusion-shaped U-Net's."""
    needed = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "cross_attention_dim")
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ValueError(f"not a Stable-Diffusion-shaped U-Net: its config lacks {', '.join(missing)}. Expected the "
                         "config of a diffusers UNet2DConditionModel.")  # fmt: skip
    known = {f"{attention}{side}Block2D" for attention in ("", "CrossAttn") for side in ("Down", "Up")}
    strange = sorted({*config["down_block_types"], *config["up_block_types"]} - known)
    if strange:
        raise ValueError(f"blocks of type {', '.join(strange)} cannot be cut: expected {', '.join(sorted(known))}")
