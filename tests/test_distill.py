import pytest
import torch
from conftest import SD_V1, SDXL, MemoryData
from diffusers import DDPMScheduler
from PIL import Image

from bksdm_utils.core.families import TextConditioning
from bksdm_utils.core.losses import (
    Distillation,
    LossWeights,
    kd_losses,
    min_snr_weights,
    prediction_distance,
    training_target,
)
from bksdm_utils.core.plans import SD_VARIANTS, SDXL_VARIANTS, VARIANTS, identity_plan
from bksdm_utils.core.surgery import build_student
from bksdm_utils.core.taps import KD_KINDS, Taps, tap_features, tap_pairs
from bksdm_utils.costs.counting import unet_inputs
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.batches import Augmentation, random_conditioning_probability
from bksdm_utils.training.encoding import probe_inputs, token_ids
from bksdm_utils.training.rng import BatchRng


def test_taps_of_base_and_small_are_the_papers():
    names = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4)]
    for variant in ("bk_base", "bk_small"):
        assert tap_pairs(variant, SD_V1) == [(name, name) for name in names]


def test_taps_of_tiny_are_the_papers():
    assert tap_pairs("bk_tiny", SD_V1) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ]


def test_taps_of_koala_are_self_attentions_of_the_first_blocks():
    pairs = tap_pairs("koala_700m", SDXL, kd="self_attention")
    assert pairs[0] == ("down_blocks.0", "down_blocks.0") and pairs[-1] == ("up_blocks.2", "up_blocks.2")
    inner = [(f"down_blocks.2.attentions.0.transformer_blocks.{k}.attn1",) * 2 for k in range(5)]
    assert pairs[3:8] == inner
    source, target = pairs[8 + 5]  # the second attention of the first up stage was the teacher's third
    assert target == "up_blocks.0.attentions.1.transformer_blocks.0.attn1"
    assert source == "up_blocks.0.attentions.2.transformer_blocks.0.attn1"
    assert len(pairs) == 1 + 2 + 5 + 10 + 4 + 1
    with pytest.raises(ValueError, match="expected one of block, self_attention"):
        tap_pairs("koala_1b", SDXL, kd="attention")


@pytest.mark.parametrize("kd", KD_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tapped_modules_exist_and_agree_in_shape(variant, kd, teacher, teacher_xl):
    network = teacher_xl if variant in SDXL_VARIANTS else teacher
    student, pairs = build_student(network, variant), tap_pairs(variant, network.config, kd)
    inputs = unet_inputs(network.config, device="cpu")
    of_teacher = tap_features(network, [t for t, _ in pairs], **inputs)
    of_student = tap_features(student, [s for _, s in pairs], **inputs)
    assert [f.shape for f in of_teacher] == [f.shape for f in of_student]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kd", KD_KINDS)
def test_an_sdxl_student_takes_a_distillation_step(kd, checkpointing, pipeline_xl_dir):
    pipe = load_pipeline(pipeline_xl_dir)
    student = build_student(pipe.unet, "koala_700m").train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    tokens = token_ids(pipe, ["a cat", "a tree at night", "a red boat"])
    assert tokens.shape == (3, 2, 20)
    data = MemoryData(torch.randn(3, 1, 4, 8, 8), torch.rand(3, 1, 4, 8, 8), tokens, tokens[:1])
    pairs, condition = tap_pairs("koala_700m", pipe.unet.config, kd), TextConditioning(pipe)
    kd_step = Distillation(pipe.unet, student, condition, DDPMScheduler(), data, pairs, LossWeights())
    losses = kd_step.losses(student, BatchRng(0, 0, range(3), 3, 3))
    assert sum(name.startswith("feature/") for name in losses) == len(pairs)
    losses["loss"].backward()
    for _, name in pairs:
        grads = [p.grad for p in student.get_submodule(name).parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads), name
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_sdxl_is_told_what_its_pipeline_would_tell_it(pipeline_xl_dir):
    pipe = load_pipeline(pipeline_xl_dir)
    told = TextConditioning(pipe)(token_ids(pipe, ["a cat", "a big red boat"]))
    hidden_states, _, pooled, _ = pipe.encode_prompt(["a cat", "a big red boat"], do_classifier_free_guidance=False)
    assert torch.equal(told["encoder_hidden_states"], hidden_states)
    assert torch.equal(told["added_cond_kwargs"]["text_embeds"], pooled)
    ids = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, text_encoder_projection_dim=16)
    assert torch.equal(told["added_cond_kwargs"]["time_ids"], ids.repeat(2, 1))
    larger = TextConditioning(pipe, resolution=96)(token_ids(pipe, ["a cat"]))
    assert larger["added_cond_kwargs"]["time_ids"].tolist() == [[96, 96, 0, 0, 96, 96]]


def test_the_distance_of_predictions_is_the_output_loss(pipeline_dir):
    pipe = load_pipeline(pipeline_dir)
    pictures = [Image.new("RGB", (70, 64), colour) for colour in ("red", "blue")]
    probes = probe_inputs(pipe, pictures, ["a", "b"], timesteps=(10, 900))
    assert [p["timestep"].tolist() for p in probes] == [[10, 10], [900, 900]]
    again = probe_inputs(pipe, pictures, ["a", "b"], timesteps=(10, 900))
    assert all(torch.equal(a["sample"], b["sample"]) for a, b in zip(probes, again, strict=True))
    student = build_student(pipe.unet, "bk_tiny")
    with torch.no_grad():
        by_hand = [((student(**p).sample - pipe.unet(**p).sample) ** 2).mean().item() for p in probes]
    found = prediction_distance(pipe.unet, student, probes)
    assert found == pytest.approx(sum(by_hand) / 2, rel=1e-5) and found > 0
    assert prediction_distance(pipe.unet, pipe.unet, probes) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", SD_VARIANTS)
def test_gradient_reaches_every_tap(variant, checkpointing, teacher):
    student = build_student(teacher, variant).train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    noise = torch.randn(2, 4, 8, 8)
    inputs = (noise, torch.tensor([10, 500]), torch.randn(2, 20, 16))
    names = [s for _, s in tap_pairs(variant, teacher.config)]
    for name in names:
        student.zero_grad()
        taps = Taps(student, [name])
        taps.listen()
        student(*inputs)
        (activation,) = taps.take()
        activation.square().mean().backward()
        own = [p for n, p in student.named_parameters() if n.startswith(name)]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own), name
        taps.close()


def test_checkpointing_does_not_change_losses_or_gradients(teacher):
    gradients = []
    for checkpointing in (False, True):
        student = build_student(teacher, "bk_tiny").train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        distillation(teacher, student, "bk_tiny").losses(student, draw())["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_activations_are_released_when_taken(teacher):
    taps, inputs = Taps(teacher, ["down_blocks.0"]), unet_inputs(teacher.config, device="cpu")
    teacher(**inputs)
    assert taps._outputs is None
    taps.listen()
    teacher(**inputs)
    assert len(taps.take()) == 1 and taps._outputs is None
    taps.close()
    taps.listen()
    teacher(**inputs)
    assert taps._outputs == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_between_two_steps_do_not_reach_the_losses(checkpointing, teacher):
    student = build_student(teacher, "bk_base").train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    kd = distillation(teacher, student, "bk_base")
    first = kd.losses(student, draw())
    first["loss"].backward()
    with torch.no_grad():  # a validation that draws, with the student and another batch size
        student(torch.randn(5, 4, 8, 8), 10, torch.randn(5, 20, 16))
        teacher(torch.randn(5, 4, 8, 8), 10, torch.randn(5, 20, 16))
    again = kd.losses(student, draw())
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
    losses = distillation(teacher, student, plan).losses(student, draw())
    assert losses["loss_output"].item() < 1e-10 and losses["loss_feature"].item() < 1e-10
    assert losses["loss"].item() == pytest.approx(losses["loss_task"].item()) and losses["loss_task"].item() > 0


def test_the_teacher_does_not_run_for_the_task_loss_alone(teacher, monkeypatch):
    student = build_student(teacher, "bk_base")
    kd = distillation(teacher, student, "bk_base", LossWeights(1, 0, 0))
    monkeypatch.setattr(teacher, "forward", lambda *_: pytest.fail("the teacher ran"))
    losses = kd.losses(student, draw())
    assert losses["loss"].item() == losses["loss_task"].item()


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        LossWeights(kd_feat=-1.0)


def distillation(teacher, student, plan, weights=None, prediction_type="epsilon", **augmentation):
    torch.manual_seed(2)
    embedding = torch.nn.Embedding(51, 16)
    condition = lambda ids: {"encoder_hidden_states": embedding(ids).detach()}  # noqa: E731
    ids, empty_ids = torch.arange(6)[:, None].expand(6, 20), torch.full((1, 20), 50)
    data = MemoryData(torch.randn(6, 2, 4, 8, 8), torch.rand(6, 2, 4, 8, 8), ids, empty_ids)
    pairs = tap_pairs(plan, teacher.config)
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    chosen = Augmentation(**augmentation)
    return Distillation(teacher, student, condition, scheduler, data, pairs, weights or LossWeights(), chosen)


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
    found = kd.losses(student, draw())
    generators = draw()
    flips = generators.integers(2)
    mean, std = kd.data.mean[generators.indices, flips], kd.data.std[generators.indices, flips]
    x0 = mean + std * generators.normal(4, 8, 8)
    eps, t = generators.normal(4, 8, 8), generators.integers(1000)
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(-1, 1, 1, 1)
    text = kd.condition(kd.data.token_ids[generators.indices])["encoder_hidden_states"]
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


def test_weights_of_taps_that_are_not_there_are_refused(teacher):
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
    plain, weighted = (
        distillation(teacher, student, "bk_base", LossWeights(min_snr_gamma=gamma), prediction_type).losses(
            student, draw()
        )
        for gamma in (0.0, 0.01)
    )
    assert plain["loss_output"] == weighted["loss_output"] and plain["loss_task"] != weighted["loss_task"]


def test_random_conditioning_is_likely_at_both_ends():
    p = random_conditioning_probability(torch.tensor([0, 250, 500, 750, 1000]), 1000, 5.0)
    assert p[0] == p[-1] == 1 and p[1] == p[3] and p[2] == p.min() == pytest.approx(torch.tensor(-2.5).exp().item())


def test_augmentation_changes_what_it_says_and_nothing_else(teacher):
    student, seen = build_student(teacher, "bk_base"), {}
    for name, chosen in {"none": {}, "empty": {"caption_dropout": 1.0}, "random": {"random_conditioning": 1e-9},
                         "offset": {"noise_offset": 0.5}}.items():  # fmt: skip
        kd = distillation(teacher, student, "bk_base", **chosen)
        noise, t = torch.zeros(3, 4, 8, 8), torch.tensor([1, 500, 999])
        seen[name] = kd._augmented(draw(), noise, kd.data.token_ids[:3], t)
        kd.close()
    assert all(
        torch.equal(a, b)
        for a, b in zip(seen["none"], (torch.zeros(3, 4, 8, 8), torch.arange(3)[:, None].expand(3, 20)), strict=True)
    )
    assert (seen["empty"][1] == 50).all() and (seen["empty"][0] == 0).all()
    captions = seen["random"][1]
    assert (captions == captions[:, :1]).all() and captions.max() < 6  # whole captions of the data set
    shift = seen["offset"][0]
    assert (shift == shift[:, :, :1, :1]).all() and shift.abs().min() > 0
    with pytest.raises(ValueError, match="at most 1"):
        Augmentation(caption_dropout=1.5)


def draw():
    return BatchRng(seed=0, step=0, positions=range(3), global_batch_size=3, num_examples=6)


def test_tap_features_leave_no_hooks(teacher):
    inputs = unet_inputs(teacher.config, device="cpu")
    features = tap_features(teacher, ["mid_block"], **inputs)
    assert features[0].shape == (1, 32, 1, 1)
    assert not teacher.mid_block._forward_hooks
