import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from bksdm_utils.core.families import TextConditioning
from bksdm_utils.core.losses import (
    Batch,
    Distillation,
    LossWeights,
    clean_latents,
    kd_losses,
    min_snr_weights,
    prediction_distance,
    training_target,
)
from bksdm_utils.core.plans import SD_VARIANTS, identity_plan
from bksdm_utils.core.surgery import build_student
from bksdm_utils.core.taps import KD_KINDS, tap_pairs
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.encoding import probe_inputs, token_ids


def batch(token_ids=None):
    """Three examples, the same at each call."""
    rng = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=rng) for _ in range(2))
    ids = torch.arange(3)[:, None].expand(3, 20) if token_ids is None else token_ids
    return Batch(latents, noise, torch.tensor([10, 400, 900]), ids)


def distillation(teacher, student, plan, weights=None, prediction_type="epsilon"):
    torch.manual_seed(2)
    embedding = torch.nn.Embedding(51, 16)
    conditioning = lambda ids: {"encoder_hidden_states": embedding(ids).detach()}  # noqa: E731
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    return Distillation(
        teacher, student, conditioning, scheduler, tap_pairs(plan, teacher.config), weights or LossWeights()
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clean_latents_undo_the_noise(prediction_type):
    scheduler, b = DDPMScheduler(prediction_type=prediction_type), batch()
    noisy = scheduler.add_noise(b.latents, b.noise, b.timesteps)
    prediction = training_target(scheduler, b.latents, b.noise, b.timesteps)
    assert torch.allclose(clean_latents(scheduler, prediction, noisy, b.timesteps), b.latents, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kd", KD_KINDS)
def test_an_sdxl_student_takes_a_distillation_step(kd, checkpointing, pipeline_xl_dir):
    pipe = load_pipeline(pipeline_xl_dir)
    student = build_student(pipe.unet, "koala_700m").train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    tokens = token_ids(pipe, ["a cat", "a tree at night", "a red boat"])
    assert tokens.shape == (3, 2, 20)
    pairs = tap_pairs("koala_700m", pipe.unet.config, kd)
    kd_step = Distillation(pipe.unet, student, TextConditioning(pipe), DDPMScheduler(), pairs)
    losses = kd_step.losses(student, batch(tokens)).named()
    assert sum(name.startswith("feature/") for name in losses) == len(pairs)
    losses["loss"].backward()
    for _, name in pairs:
        grads = [p.grad for p in student.get_submodule(name).parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads), name
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_the_distance_of_predictions_is_the_output_loss(pipeline_dir):
    pipe = load_pipeline(pipeline_dir)
    images = [Image.new("RGB", (70, 64), colour) for colour in ("red", "blue")]
    probes = probe_inputs(pipe, images, ["a", "b"], timesteps=(10, 900))
    assert [p["timestep"].tolist() for p in probes] == [[10, 10], [900, 900]]
    again = probe_inputs(pipe, images, ["a", "b"], timesteps=(10, 900))
    assert all(torch.equal(a["sample"], b["sample"]) for a, b in zip(probes, again, strict=True))
    student = build_student(pipe.unet, "bk_tiny")
    with torch.no_grad():
        by_hand = [((student(**p).sample - pipe.unet(**p).sample) ** 2).mean().item() for p in probes]
    found = prediction_distance(pipe.unet, student, probes)
    assert found == pytest.approx(sum(by_hand) / 2, rel=1e-5) and found > 0
    assert prediction_distance(pipe.unet, pipe.unet, probes) == 0


def test_checkpointing_does_not_change_losses_or_gradients(teacher):
    gradients = []
    for checkpointing in (False, True):
        student = build_student(teacher, "bk_tiny").train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        distillation(teacher, student, "bk_tiny").losses(student, batch()).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_between_two_steps_do_not_reach_the_losses(checkpointing, teacher):
    student = build_student(teacher, "bk_base").train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    kd = distillation(teacher, student, "bk_base")
    first = kd.losses(student, batch()).named()
    first["loss"].backward()
    with torch.no_grad():  # a validation that samples, with the student and another batch size
        student(torch.randn(5, 4, 8, 8), 10, torch.randn(5, 20, 16))
        teacher(torch.randn(5, 4, 8, 8), 10, torch.randn(5, 20, 16))
    again = kd.losses(student, batch()).named()
    assert all(first[name].item() == again[name].item() for name in first)
    assert again["loss_feature"].requires_grad


def test_losses_equal_an_independent_computation():
    torch.manual_seed(0)
    student, teacher, target, a, b = (torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(5))
    losses = kd_losses(student, teacher, target, {"tap": (a, b)}, LossWeights(0.5, 2.0, 3.0))
    by_hand = [((x - y) ** 2).sum().item() / x.numel() for x, y in ((student, target), (student, teacher), (a, b))]
    found = [losses.task.item(), losses.output.item(), losses.feature["tap"].item()]
    assert found == pytest.approx(by_hand, rel=1e-6)
    assert losses.total.item() == pytest.approx(0.5 * by_hand[0] + 2 * by_hand[1] + 3 * by_hand[2], rel=1e-6)


def test_v_prediction_target():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    latents, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 400, 900])
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    expected = a.sqrt() * noise - (1 - a).sqrt() * latents
    assert torch.allclose(training_target(scheduler, latents, noise, t), expected, atol=1e-6)
    with pytest.raises(ValueError, match="expected epsilon or v_prediction"):
        training_target(DDPMScheduler(prediction_type="sample"), latents, noise, t)


def test_an_untouched_student_has_no_distillation_loss(teacher):
    plan = identity_plan(teacher.config)
    student = build_student(teacher, plan)
    losses = distillation(teacher, student, plan).losses(student, batch()).named()
    assert losses["loss_output"].item() < 1e-10 and losses["loss_feature"].item() < 1e-10
    assert losses["loss"].item() == pytest.approx(losses["loss_task"].item()) and losses["loss_task"].item() > 0


def test_the_teacher_does_not_run_for_the_task_loss_alone(teacher, monkeypatch):
    student = build_student(teacher, "bk_base")
    kd = distillation(teacher, student, "bk_base", LossWeights(1, 0, 0))
    monkeypatch.setattr(teacher, "forward", lambda *_: pytest.fail("the teacher ran"))
    losses = kd.losses(student, batch()).named()
    assert losses["loss"].item() == losses["loss_task"].item()


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        LossWeights(kd_feat=-1.0)


def hooked(model, names, inputs):
    """Outputs of modules by plain forward hooks, and the prediction."""
    kept, handles = {}, []
    for name in names:
        keep = lambda _m, _i, out, n=name: kept.update({n: out[0] if isinstance(out, tuple) else out})  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    prediction = model(*inputs).sample
    for handle in handles:
        handle.remove()
    return prediction, [kept[name] for name in names]


PAPER_TAPS = {  # (teacher, student), written out: section 3.2 of the paper, figure 3
    "bk_tiny": [("down_blocks.0",) * 2, ("down_blocks.1",) * 2,
                ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
                *((f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in range(3))],
}  # fmt: skip
for _name in ("bk_base", "bk_small"):
    PAPER_TAPS[_name] = [(f"{side}_blocks.{i}",) * 2 for side in ("down", "up") for i in range(4)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variant", SD_VARIANTS)
def test_a_step_equals_a_plain_reference(variant, prediction_type, teacher):
    """The whole step again, from the same random numbers, in as few words as the paper's formula."""
    student = build_student(teacher, variant)
    kd = distillation(teacher, student, variant, prediction_type=prediction_type)
    found = kd.losses(student, batch()).named()
    x0, eps, t = batch().latents, batch().noise, batch().timesteps
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(-1, 1, 1, 1)
    text = kd.conditioning(batch().token_ids)["encoder_hidden_states"]
    inputs = (a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text)
    by_teacher, of_teacher = hooked(teacher, [pair[0] for pair in PAPER_TAPS[variant]], inputs)
    by_student, of_student = hooked(student, [pair[1] for pair in PAPER_TAPS[variant]], inputs)
    target = eps if prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x0
    feature = sum(((s - f) ** 2).mean() for s, f in zip(of_student, of_teacher, strict=True))
    task, output = ((by_student - target) ** 2).mean(), ((by_student - by_teacher) ** 2).mean()
    expected = {"loss_task": task, "loss_output": output, "loss_feature": feature}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert found["loss"].item() == pytest.approx(sum(expected.values()).item(), rel=1e-5)


def test_taps_can_be_normalised_and_weighted():
    student, teacher = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 2.0)
    zero, pairs = torch.zeros(1, 4, 1, 1), {"a": (student, teacher), "b": (student * 100, teacher * 100)}
    plain = kd_losses(zero, zero, zero, pairs)
    assert [v.item() for v in plain.feature.values()] == [1.0, 10_000.0]
    alike = kd_losses(zero, zero, zero, pairs, LossWeights(normalise=True, taps={"b": 3.0}))
    assert [v.item() for v in alike.feature.values()] == pytest.approx([0.25, 0.75])
    assert kd_losses(zero, zero, zero, {"a": (zero, zero)}, LossWeights(normalise=True)).total == 0


def test_weights_of_taps_that_do_not_exist_are_refused(teacher):
    student = build_student(teacher, "bk_tiny")
    with pytest.raises(ValueError, match="unknown taps .'up_blocks.3'."):
        distillation(teacher, student, "bk_tiny", LossWeights(taps={"up_blocks.3": 2.0}))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_task_loss_only(prediction_type, teacher):
    scheduler, t = DDPMScheduler(prediction_type=prediction_type), torch.tensor([0, 500, 999])
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    by_hand = snr.clamp(max=5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    assert torch.allclose(min_snr_weights(scheduler, t, 5.0), by_hand)
    student = build_student(teacher, "bk_base")
    weights = (LossWeights(min_snr_gamma=gamma) for gamma in (0.0, 0.01))
    plain, weighted = (
        distillation(teacher, student, "bk_base", w, prediction_type).losses(student, batch()) for w in weights
    )
    assert plain.output == weighted.output and plain.task != weighted.task
