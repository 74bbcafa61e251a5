"""The method again in as few words as possible, with no code of ours: students, losses, AdamW, clipping, EMA, adapters.

What is written out here is what the paper says (sections 3.1, 3.2, appendix); ours must give the same numbers.
"""

import io
import re
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from conftest import NARROW
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image

from bksdm_utils.config.training import Training
from bksdm_utils.core.copying import weight_map
from bksdm_utils.core.losses import Batch, Distillation
from bksdm_utils.core.surgery import build_student
from bksdm_utils.core.taps import tap_pairs
from bksdm_utils.dreambooth.job import _add_adapters
from bksdm_utils.evaluation.folders import write_image
from bksdm_utils.evaluation.protocols import as_paper
from bksdm_utils.training.ema import Average
from bksdm_utils.training.trainer import Trainer

VARIANTS = ("bk_base", "bk_small", "bk_tiny")
STEPS, PER_BATCH, MICRO_BATCHES = 10, 2, 2
RATE, BETAS, EPSILON, DECAY, CLIP, CAP = 1e-4, (0.9, 0.999), 1e-8, 1e-2, 0.5, 0.7


def plain_config(variant):
    """The student's config, written out for the narrow teacher of four stages."""
    config = NARROW | {"layers_per_block": 1}
    if variant != "bk_base":
        config["mid_block_type"] = None
    if variant == "bk_tiny":
        config |= {"block_out_channels": NARROW["block_out_channels"][:3],
                   "down_block_types": NARROW["down_block_types"][:3],
                   "up_block_types": NARROW["up_block_types"][1:]}  # fmt: skip
    return config


def plain_source(name, variant):
    """The teacher's name of a student's parameter: of three pairs on the way up, the first and the last stay."""
    name = re.sub(r"^(up_blocks\.\d\.(?:resnets|attentions))\.1\.", r"\1.2.", name)
    if variant == "bk_tiny":  # the innermost stage is gone: up block 0 was the teacher's 1
        name = re.sub(r"^up_blocks\.(\d)", lambda match: f"up_blocks.{int(match[1]) + 1}", name)
    return name


def plain_student(teacher, variant):
    student, weights = UNet2DConditionModel.from_config(plain_config(variant)), teacher.state_dict()
    student.load_state_dict({name: weights[plain_source(name, variant)] for name in student.state_dict()})
    return student


@pytest.mark.parametrize("variant", VARIANTS)
def test_students_are_those_of_the_paper(variant, teacher):
    ours, plain = build_student(teacher, variant), plain_student(teacher, variant)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())
    assert weight_map(teacher.config, variant) == {name: plain_source(name, variant) for name in plain.state_dict()}
    for (name, one), (other_name, other) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)


class TenSteps:
    """Latents, noise, timesteps and texts of ten steps; called as the trainer calls its batches."""

    num_examples = None

    def __init__(self):
        rng = torch.Generator().manual_seed(3)
        count = STEPS * MICRO_BATCHES * PER_BATCH
        self.latents, self.noise = (torch.randn(count, 4, 8, 8, generator=rng) for _ in range(2))
        self.timesteps = torch.randint(1000, (count,), generator=rng)
        self.texts = torch.randn(count, 20, 16, generator=rng)

    def __call__(self, rng):
        start = rng.step * MICRO_BATCHES * PER_BATCH + rng.positions.start
        chosen = slice(start, start + PER_BATCH)
        return Batch(self.latents[chosen], self.noise[chosen], self.timesteps[chosen], torch.arange(start, chosen.stop))


def taps_of(variant):
    """(teacher, student) modules of the feature loss, figure 3 of the paper."""
    if variant != "bk_tiny":
        return [(f"{side}_blocks.{i}",) * 2 for side in ("down", "up") for i in range(4)]
    third = "down_blocks.2.attentions.{}.proj_out"
    return [("down_blocks.0",) * 2, ("down_blocks.1",) * 2, (third.format(1), third.format(0)),
            *((f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in range(3))]  # fmt: skip


def observed(network, names, *inputs):
    """The prediction, and what the named modules return: the hidden states alone, without those for the skips."""
    kept, handles = {}, []
    for name in names:
        keep = lambda _m, _i, out, n=name: kept.update({n: out[0] if isinstance(out, tuple) else out})  # noqa: E731
        handles.append(network.get_submodule(name).register_forward_hook(keep))
    prediction = network(*inputs).sample
    for handle in handles:
        handle.remove()
    return prediction, [kept[name] for name in names]


def plain_losses(teacher, student, taps, prediction_type, batch, texts):
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[batch.timesteps].view(-1, 1, 1, 1)
    inputs = (a.sqrt() * batch.latents + (1 - a).sqrt() * batch.noise, batch.timesteps, texts)
    with torch.no_grad():
        target, wanted = observed(teacher, [pair[0] for pair in taps], *inputs)
    found, features = observed(student, [pair[1] for pair in taps], *inputs)
    v = a.sqrt() * batch.noise - (1 - a).sqrt() * batch.latents
    task = ((found - (batch.noise if prediction_type == "epsilon" else v)) ** 2).mean()
    output = ((found - target) ** 2).mean()
    feature = sum(((own - theirs) ** 2).mean() for own, theirs in zip(features, wanted, strict=True))
    return {"loss_task": task, "loss_output": output, "loss_feature": feature, "loss": task + output + feature}


def adamw(p, g, m, v, step):
    """Decoupled weight decay (arXiv 1711.05101), in place."""
    p.mul_(1 - RATE * DECAY)
    m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
    v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g * g)
    unbiased, scale = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
    p.sub_(RATE * unbiased / (scale.sqrt() + EPSILON))


@cache
def plain_loop(variant, prediction_type):
    """Ten steps; the losses and the norm of the gradient of each, then the weights and the averaged weights."""
    torch.manual_seed(1)
    teacher, data = UNet2DConditionModel.from_config(NARROW).eval(), TenSteps()
    student = plain_student(teacher, variant).train()
    parameters, rows = list(student.parameters()), []
    average, m, v = ([p.detach().clone() * keep for p in parameters] for keep in (1, 0, 0))
    for step in range(1, STEPS + 1):
        row = {}
        for k in range(MICRO_BATCHES):
            rng = type("Position", (), {"step": step - 1, "positions": range(k * PER_BATCH, (k + 1) * PER_BATCH)})
            batch = data(rng)
            losses = plain_losses(
                teacher, student, taps_of(variant), prediction_type, batch, data.texts[batch.token_ids]
            )
            (losses["loss"] / MICRO_BATCHES).backward()
            row = {name: row.get(name, 0) + value.item() / MICRO_BATCHES for name, value in losses.items()}
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters)).item()
        with torch.no_grad():
            for p, first, second, mean in zip(parameters, m, v, average, strict=True):
                adamw(p, p.grad * min(1, CLIP / norm), first, second, step)
                decay = min(CAP, step / (step + 9)) if step > 1 else 0
                mean.mul_(decay).add_((1 - decay) * p)
                p.grad = None
        rows.append(row | {"norm": norm})
    return rows, parameters, average


CASES = [pytest.param(*case, marks=() if case == ("bk_tiny", "epsilon", True) else pytest.mark.slow)
         for case in product(VARIANTS, ("epsilon", "v_prediction"), (False, True))]  # fmt: skip


@pytest.mark.parametrize(("variant", "prediction_type", "checkpointing"), CASES)
def test_ten_steps_equal_a_plain_loop(variant, prediction_type, checkpointing, teacher, tmp_path):
    data, student = TenSteps(), build_student(teacher, variant)
    expected, plain, averages = plain_loop(variant, prediction_type)
    if checkpointing:
        student.enable_gradient_checkpointing()
    conditioning = lambda ids: {"encoder_hidden_states": data.texts[ids]}  # noqa: E731
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    distillation = Distillation(teacher, student, conditioning, scheduler, tap_pairs(variant, teacher.config))
    config = Training(
        batch_size=PER_BATCH, gradient_accumulation_steps=MICRO_BATCHES, max_train_steps=STEPS, learning_rate=RATE,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPSILON, weight_decay=DECAY, max_grad_norm=CLIP,
        ema_decay=CAP,
    )  # fmt: skip
    trainer = Trainer(student, config, tmp_path)
    steps = trainer.steps(lambda model, batch: distillation.losses(model, batch).named(), data)
    for step, row in zip(steps, expected, strict=False):
        found = {name: step.losses[name] for name in row if name != "norm"} | {"norm": step.gradient_norm}
        assert found == pytest.approx(row, rel=2e-5, abs=1e-6), step.step
    assert trainer.step == STEPS and max(row["norm"] for row in expected) > CLIP  # clipping acted
    # 2e-5 is 2 % of what ten steps of AdamW can move a weight.
    assert all(torch.allclose(p, q, atol=2e-5) for p, q in zip(student.parameters(), plain, strict=True))
    assert all(torch.allclose(p, q, atol=2e-5) for p, q in zip(trainer.ema.shadow_params, averages, strict=True))


@pytest.mark.parametrize(
    ("updates", "decay"),
    [(1, 0.0), (2, 2 / 11), (100, 100 / 109), (1000, 1000 / 1009), (50_000, 50_000 / 50_009), (10**6, 0.9999)],
)
def test_the_average_follows_fast_at_first_and_slowly_at_last(updates, decay):
    """n / (n + 9) after n updates, at most `ema_decay`; the first one takes the weights as they are."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average = Average([parameter], 0.9999)
    parameter.data.fill_(1.0)
    average.optimization_step = updates - 1
    average.step([parameter])
    assert average.shadow_params[0].item() == pytest.approx(1 - decay, abs=1e-9)


def test_an_average_kept_elsewhere_moves_by_the_same_decays(monkeypatch):
    values, elsewhere = [torch.nn.Parameter(torch.zeros(3))], [torch.nn.Parameter(torch.empty(3, device="meta"))]
    beside, apart = Average(values, 0.9999), Average(values, 0.9999)
    monkeypatch.setattr(apart, "_copies", lambda _: [value.detach() for value in values])
    for _ in range(30):
        values[0].data += 1
        beside.step(values)
        apart.step(elsewhere, flush=True)
        torch.testing.assert_close(apart.shadow_params, beside.shadow_params)


def test_adapters_add_alpha_over_rank_times_b_a():
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(NARROW)
    plain = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.detach().clone()
    _add_adapters(unet, rank=3, alpha=5.0, targets=("to_q",), dropout=0.0)
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    down, up = layer.lora_A["default"].weight, torch.randn_like(layer.lora_B["default"].weight)
    layer.lora_B["default"].weight.data.copy_(up)
    x = torch.randn(2, 8)
    assert down.shape == (3, 8) and torch.allclose(layer(x), x @ (plain + 5 / 3 * up @ down).T, atol=1e-5)


def test_the_papers_files_are_equal_byte_for_byte(tmp_path):
    """512 pixels as JPEG of quality 75, read again, bicubic to 256, JPEG again; the networks see these."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC)
    image.save(tmp_path / "im512.jpg")  # Pillow's default quality is 75
    Image.open(tmp_path / "im512.jpg").resize((256, 256)).save(tmp_path / "im256.jpg")
    (tmp_path / "images").mkdir()
    write_image(tmp_path, "a", image, "jpeg")
    stored = tmp_path / "images" / "a.jpg"
    assert stored.read_bytes() == (tmp_path / "im512.jpg").read_bytes()
    for given in (Image.open(stored), image):  # stored as the paper stores it, or without loss
        seen = as_paper(given)
        assert seen.fp.getvalue() == (tmp_path / "im256.jpg").read_bytes() and isinstance(seen.fp, io.BytesIO)
