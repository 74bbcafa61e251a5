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

    def describe(self, teacher_config: Mapping | None = None) -> str:
        """What stays, a line for each run of equal stages; given a teacher, also out of how much.

        Raises:
            ValueError: the plan does not fit the teacher.
        """
        if teacher_config is not None:
            self.check(teacher_config)
        lines = []
        for stage, group in groupby(enumerate(self.stages), key=lambda numbered: numbered[1]):
            numbers = [number for number, _ in group]
            where = f"stage {numbers[0]}" if len(numbers) == 1 else f"stages {numbers[0]} to {numbers[-1]}"
            lines.append(f"  {where}: keep {_kept(stage, teacher_config, numbers[0])}")
        gone = 0 if teacher_config is None else len(teacher_config["block_out_channels"]) - len(self.stages)
        if gone:
            lines.append(f"  innermost stages removed: {gone}")
        return "\n".join([self.name, *lines, f"  mid block: {'kept' if self.mid else 'removed'}"])

    def to_json(self) -> str:
        """The plan as JSON, for a file that goes wherever a variant's name goes."""
        return json.dumps(asdict(self))

    def check(self, teacher_config: Mapping) -> None:
        """Raises ValueError, saying which rule is broken, if no student of this teacher can follow the plan."""
        check_unet(teacher_config)
        channels, depths = list(teacher_config["block_out_channels"]), attention_depths(teacher_config)
        kept, total = len(self.stages), len(channels)
        if not 1 <= kept <= total:
            raise ValueError(
                f"plan {self.name!r} has {kept} stages, the teacher {total}: keep between 1 and {total} "
                "(named_plans(teacher_config) has those that fit)"
            )
        if kept < total and channels[kept - 1] != channels[kept]:
            raise ValueError(
                f"plan {self.name!r} removes the innermost {total - kept} stages, but the teacher's stage {kept - 1} "
                f"has {channels[kept - 1]} channels and stage {kept} {channels[kept]}: the decoder's weights would not "
                f"fit. Remove only stages as wide as the one that becomes innermost."
            )
        for number, stage in enumerate(self.stages):
            _check_stage(stage, f"plan {self.name!r}, stage {number}", teacher_config, number)
            if stage.depth is not None and not 1 <= stage.depth <= depths[number]:
                where = f"plan {self.name!r}, stage {number}"
                raise ValueError(f"{where}: depth {stage.depth} must be 1 … {depths[number]}")
        if self.mid:
            self._check_mid(teacher_config, depths)

    def _check_mid(self, teacher_config: Mapping, depths: Sequence[int]) -> None:
        if teacher_config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None:
            raise ValueError(f"plan {self.name!r} keeps the mid block, but the teacher has none: give mid=False")
        inner, channels = len(self.stages) - 1, teacher_config["block_out_channels"]
        heads, depth = teacher_config.get("attention_head_dim", 8), self.stages[inner].depth or depths[inner]
        if channels[inner] != channels[-1] or depth > depths[-1]:
            raise ValueError(
                f"plan {self.name!r} keeps the mid block of {channels[-1]} channels and depth {depths[-1]} under stage "
                f"{inner} of {channels[inner]} channels and depth {depth}: remove the mid block too"
            )
        if isinstance(heads, (list, tuple)) and heads[inner] != heads[-1]:
            raise ValueError(
                f"plan {self.name!r} keeps the mid block, whose attention has {heads[-1]} heads, under stage {inner} "
                f"with {heads[inner]}: the student's mid block would compute something else. Remove it too."
            )


def _kept(stage: Stage, teacher_config: Mapping | None, number: int) -> str:
    layers = layers_per_stage(teacher_config)[number] if teacher_config is not None else None
    down, up = (", ".join(map(str, pairs)) for pairs in (stage.down, stage.up))
    of_down, of_up = ("", "") if layers is None else (f" of {layers}", f" of {layers + 1}")
    depth = "" if stage.depth is None else f", the first {stage.depth} transformer blocks of each attention"
    return f"pair {down}{of_down} down, pairs {up}{of_up} up{depth}"


def _check_stage(stage: Stage, where: str, config: Mapping, number: int) -> None:
    layers = layers_per_stage(config)[number]
    for side, pairs, available in (("down", stage.down, layers), ("up", stage.up, layers + 1)):
        if list(pairs) != sorted(set(pairs)) or not set(pairs) <= set(range(available)):
            raise ValueError(f"{where}: {side}={pairs} must be rising numbers among 0 … {available - 1}")
    if not stage.down:
        raise ValueError(f"{where}: down={stage.down} keeps no pair; keep one, or remove the innermost stages whole")
    if len(stage.up) != len(stage.down) + 1:
        raise ValueError(
            f"{where}: {len(stage.down)} pairs down need {len(stage.down) + 1} up, not {len(stage.up)}: every "
            f"skip connection needs both its ends"
        )
    widths = list(config["block_out_channels"])
    for position, pair in enumerate(stage.down):
        given, wanted = _down_input(widths, number, position), _down_input(widths, number, pair)
        if given != wanted:
            raise ValueError(f"{where}: pair 0 of down must stay, it takes {given} channels where pair {pair} takes "
                             f"{wanted}")  # fmt: skip
    for position, pair in enumerate(stage.up):
        given = _up_input(widths, number, position, len(stage.down))
        wanted = _up_input(widths, number, pair, layers)
        if given != wanted:
            raise ValueError(
                f"{where}: pair {pair} of up cannot be in position {position}: there it gets {given[0]} channels from "
                f"below and {given[1]} from its skip connection, and was made for {wanted[0]} and {wanted[1]}"
            )


def _down_input(widths: Sequence[int], stage: int, pair: int) -> int:
    """Channels that reach a pair on the way down."""
    return widths[stage] if pair else widths[max(stage - 1, 0)]


def _up_input(widths: Sequence[int], stage: int, pair: int, layers: int) -> tuple[int, int]:
    """Channels that reach a pair on the way up: from below, and by its skip connection."""
    below = widths[stage] if pair else widths[min(stage + 1, len(widths) - 1)]
    return below, widths[max(stage - 1, 0)] if pair == layers else widths[stage]


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
    return replace(kept, stages=tuple(replace(stage, depth=depth) for stage, depth in stages))


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
ALIASES = {"sd_small": "bk_base", "sd_tiny": "bk_tiny"}  # segmind/distill-sd's names for the same plans


def is_sdxl(config: Mapping) -> bool:
    """Whether a U-Net config is SDXL's, which adds a pooled text embedding and sizes to its time embedding."""
    return config.get("addition_embed_type") == "text_time"


def named_plans(teacher_config: Mapping) -> dict[str, RemovalPlan]:
    """The named plans made for a teacher of this kind that fit it: SDXL's, or Stable Diffusion's."""
    rules = SDXL_VARIANTS if is_sdxl(teacher_config) else SD_VARIANTS
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
    depths, found = attention_depths(teacher_config), {}
    for number, stage in enumerate(plan.stages):

        def changed(number=number, **parts) -> RemovalPlan:
            stages = [replace(s, **parts) if i == number else s for i, s in enumerate(plan.stages)]
            return replace(plan, stages=tuple(stages))

        for down, up in product(stage.down, stage.up):
            rest = {"down": tuple(p for p in stage.down if p != down), "up": tuple(p for p in stage.up if p != up)}
            found[f"stage {number}: down {down}, up {up}"] = changed(**rest)
        depth = stage.depth or depths[number]
        if depth > 1 and "CrossAttn" in teacher_config["down_block_types"][number]:
            found[f"stage {number}: depth {depth} to {depth - 1}"] = changed(depth=depth - 1)
    if plan.mid:
        found["mid block"] = replace(plan, mid=False)
    found["innermost stage"] = replace(plan, stages=plan.stages[:-1])
    return {unit: replace(p, name=f"without {unit}") for unit, p in found.items() if fits(p, teacher_config)}


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
        raise ValueError(
            f"not a Stable-Diffusion-shaped U-Net: its config lacks {', '.join(missing)}. "
            "Expected the config of a diffusers UNet2DConditionModel."
        )
    known = {f"{attention}{side}Block2D" for attention in ("", "CrossAttn") for side in ("Down", "Up")}
    strange = sorted({*config["down_block_types"], *config["up_block_types"]} - known)
    if strange:
        raise ValueError(f"blocks of type {', '.join(strange)} cannot be cut: expected {', '.join(sorted(known))}")
