"""Settings of the optimizer step, of crops, of the start: each does what it says, and changes the result."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from distilling import losses, newest, prepared, trained, write_config
from PIL import Image

from bksdm_utils.config.training import OWN_SCHEDULES, Training
from bksdm_utils.data.images import to_pixels
from bksdm_utils.training.checkpoints import Checkpoints
from bksdm_utils.training.encoding import crop_centres
from bksdm_utils.training.job import train
from bksdm_utils.training.trainer import Trainer

STEPS = 40
CONFIG = Training(max_train_steps=6, batch_size=4, learning_rate=1e-2, checkpoint_steps=2)
EXAMPLES = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


class Batches:
    """Batches that are the random numbers themselves."""

    num_examples = len(EXAMPLES)

    def __call__(self, rng):
        return rng


BATCHES = Batches()


def model():
    torch.manual_seed(1)
    return torch.nn.Linear(3, 3)


def loss_function(linear, batch):
    return {"loss": F.mse_loss(linear(EXAMPLES[batch.indices] + batch.normal(3)), EXAMPLES[batch.indices])}


def theirs(name, **options):
    """The rates of diffusers' schedule, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    schedule, rates = get_scheduler(name, optimizer, num_training_steps=STEPS, **options), []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("name", "ours", "given"),
    [
        ("constant_with_warmup", {}, {}),
        ("cosine_with_restarts", {"lr_num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_power": 2.0}, {"power": 2.0}),
        ("polynomial", {}, {}),
    ],
)
def test_schedules_of_diffusers_give_its_rates(name, ours, given, warmup):
    config = Training(max_train_steps=STEPS, learning_rate=2e-3, lr_schedule=name, lr_warmup_steps=warmup, **ours)
    rates = [config.learning_rate_at(step) for step in range(STEPS)]
    assert rates == pytest.approx(theirs(name, num_warmup_steps=warmup, **given), rel=1e-9)


@pytest.mark.parametrize("name", OWN_SCHEDULES)
def test_schedules_of_both_are_equal_but_for_the_first_steps(name):
    """Ours warms up from above 0; with lr_decay_start at the end of warm-up the fall is diffusers'."""
    config = Training(max_train_steps=STEPS, learning_rate=2e-3, lr_schedule=name)
    assert [config.learning_rate_at(step) for step in range(STEPS)] == pytest.approx(theirs(name, num_warmup_steps=0))
    if name != "constant":
        warm = config.but(lr_warmup_steps=8, lr_decay_start=8 / STEPS)
        rates = [warm.learning_rate_at(step) for step in range(STEPS)]
        assert rates[8:] == pytest.approx(theirs(name, num_warmup_steps=8)[8:], rel=1e-9)
        assert rates[0] == pytest.approx(2e-3 / 9)


def by_hand(config, steps):
    """Clipping and AdamW with torch's own parts; the gradients are the run's, one fixed direction a step."""
    linear, betas = model(), (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=config.learning_rate, betas=betas, eps=config.adam_epsilon,
                                  weight_decay=config.weight_decay)  # fmt: skip
    trainer_rngs = Trainer(model(), config.but(checkpoint_steps=0), "unused")
    for step in range(steps):
        loss_function(linear, trainer_rngs._rng(step, 0, BATCHES.num_examples))["loss"].backward()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(linear.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return linear.weight


PLAIN = CONFIG.but(checkpoint_steps=0)


@pytest.mark.parametrize(
    "knob",
    [
        {},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_epsilon": 0.1},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 0.0},
    ],
)
def test_adamw_and_clipping_are_torchs(knob, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, results = PLAIN.but(**knob), []
    for changed in (config, PLAIN):
        trainer = Trainer(model(), changed, tmp_path / "run")
        for _ in trainer.steps(loss_function, BATCHES):
            pass
        results.append(trainer.model.weight)
    assert torch.allclose(results[0], by_hand(config, 6), atol=1e-7)
    assert torch.equal(*results) == (not knob)  # each changes the result


def test_scale_lr_multiplies_by_the_global_batch(tmp_path):
    config = PLAIN.but(batch_size=2, gradient_accumulation_steps=2)
    scaled = config.but(scale_lr=True)
    assert [scaled.learning_rate_at(step) for step in (0, 5)] == [4 * config.learning_rate_at(s) for s in (0, 5)]
    step = next(Trainer(model(), scaled, tmp_path).steps(loss_function, BATCHES))
    assert step.learning_rate == pytest.approx(4e-2)


def test_without_an_average_only_raw_weights_are_saved(narrow, tmp_path):
    folder = tmp_path / "run"
    os.makedirs(folder / "unet_ema")  # of an earlier run
    train(write_config(folder, **narrow, ema_decay=0.0), folder, "cpu", None)
    assert (folder / "unet" / "config.json").exists() and not (folder / "unet_ema").exists()
    assert not list((folder / "checkpoints").glob("*/unet_ema"))
    with pytest.raises(ValueError, match='"ema_decay": \\[0.0, 0.9999\\]'):
        prepared(folder, **narrow, resume=True)


def test_a_run_of_random_weights_starts_elsewhere_and_is_another_run(narrow, tmp_path):
    copied = prepared(tmp_path / "copied", **narrow)
    drawn = prepared(tmp_path / "random", **narrow, copy_weights=False)
    same, other = (prepared(tmp_path / "n", **narrow, copy_weights=False, seed=s).student for s in (0, 1))
    weight = lambda unet: unet.down_blocks[0].resnets[0].conv1.weight  # noqa: E731
    assert torch.equal(weight(copied.student), weight(copied.pipe.unet))
    assert not torch.equal(weight(drawn.student), weight(drawn.pipe.unet))
    assert torch.equal(weight(drawn.student), weight(same)) and not torch.equal(weight(same), weight(other))
    for _ in drawn.progress():
        pass
    with pytest.raises(ValueError, match='"copy_weights": \\["False", "True"\\]'):
        trained(tmp_path / "random", **narrow, resume=True)


def test_all_checkpoints_are_kept_with_0_and_their_disk_is_counted(tmp_path):
    trainer = Trainer(model(), CONFIG.but(checkpoint_steps=1, checkpoints_kept=0), tmp_path)
    assert trainer._checkpoints_to_come() == 6
    assert len(list(trainer.steps(loss_function, BATCHES))) == 6
    assert [path.name[-1] for path in trainer.checkpoints.all] == list("123456")


def test_a_named_checkpoint_is_continued_and_later_ones_are_set_aside(narrow, tmp_path):
    folder = tmp_path / "run"
    rows, weights = trained(folder, **narrow, checkpoints_kept=0)
    job = prepared(folder, **narrow, checkpoints_kept=0, resume=True, checkpoint="step_00000002")
    checkpoints, path = Checkpoints(folder, "unet", 0), folder / "checkpoints" / "step_00000002"
    assert checkpoints.find(str(path)) == checkpoints.find("step_00000002") == path != checkpoints.newest
    job.begin(resume=True)
    assert job.trainer.step == 2 and [path.name for path in job.trainer.checkpoints.all] == ["step_00000002"]
    assert {path.name for path in (folder / "checkpoints.old").iterdir()} == {"step_00000004", "step_00000006"}
    for _ in job.steps():
        pass
    assert losses(job.log.rows) == losses(rows)
    assert all(torch.equal(weights[name], tensor) for name, tensor in newest(folder).items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": "step_00000003"}, "expected the folder of a checkpoint, or one of .*step_00000006"),
        ({"lr_schedule": "cosine"}, '"lr_schedule": ."constant", "cosine"'),
        ({"lr_warmup_steps": 3}, "lr_warmup_steps"),
        ({"adam_epsilon": 1e-6}, "adam_epsilon"),
        ({"max_train_steps": 4}, "has step 6, beyond max_train_steps 4"),
    ],
)
def test_a_resumption_that_cannot_be_is_refused_before_anything_is_loaded(narrow, tmp_path, monkeypatch, changes, said):
    trained(tmp_path / "run", **narrow)
    monkeypatch.setattr("bksdm_utils.training.job.load_pipeline", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path / "run", **{**narrow, "resume": True, **changes})


# --- images


def gradient(width=96, height=64):
    """An image whose columns all differ."""
    values = np.linspace(0, 255, width).round().astype(np.uint8)
    return Image.fromarray(np.repeat(np.tile(values, (height, 1))[:, :, None], 3, 2))


def test_a_crop_lies_where_it_is_asked_for():
    whole = torch.from_numpy(np.array(gradient())).permute(2, 0, 1).float() / 127.5 - 1
    for centre, start in (((0.0, 0.5), 0), ((0.5, 0.5), 16), ((1.0, 0.5), 32)):
        assert torch.equal(to_pixels(gradient(), 64, centre), whole[:, :, start : start + 64])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_scaling_is_pillows(interpolation):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8))
    expected = noise.resize((64, 64), Image.Resampling[interpolation.upper()])
    found = (to_pixels(noise, 64, interpolation=interpolation) + 1) * 127.5
    assert torch.equal(found.round().to(torch.uint8), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_random_crops_follow_from_the_image_alone_and_cover_it():
    assert crop_centres("a", 0) == [(0.5, 0.5)] and crop_centres("a", 3) == crop_centres("a", 3)
    assert crop_centres("a", 3)[:2] == crop_centres("a", 2) != crop_centres("b", 2)
    x, y = zip(*(centre for i in range(100) for centre in crop_centres(str(i), 2)), strict=True)
    assert min(x + y) < 0.05 and max(x + y) > 0.95 and np.mean(x) == pytest.approx(0.5, abs=0.1)


def test_the_cache_holds_every_crop_and_flip(narrow, tmp_path):
    for i in range(8):
        gradient(96 + i).save(f"{narrow['train_data_dir']}/{i}.png")
    few = {**narrow, "variant": "bk_tiny", "flip": True}
    plain, cropped = (prepared(tmp_path / str(n), **few, random_crops=n) for n in (0, 2))
    assert (plain.config.num_views, cropped.config.num_views) == (2, 4) and plain.data.key != cropped.data.key
    views = [cropped.data.moments([3], [side])[0] for side in range(4)]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(views) for b in views[:i])
    image = gradient(99)
    crops = [to_pixels(image, 64, c) for c in crop_centres(_key(narrow, 3), 2)]
    for side, pixels in enumerate(p for crop in crops for p in (crop, crop.flip(-1))):
        with torch.no_grad():
            mean = cropped.pipe.vae.encode(pixels[None]).latent_dist.mean * cropped.pipe.vae.config.scaling_factor
        assert torch.allclose(mean, views[side], atol=2e-3), side


def _key(narrow, number):
    from hashlib import sha256

    with open(f"{narrow['train_data_dir']}/{number}.png", "rb") as file:
        return sha256(file.read()).hexdigest()


def test_max_train_samples_takes_the_first_ones(narrow, tmp_path):
    job = prepared(tmp_path / "run", **narrow, max_train_samples=3)
    assert job.data.num_examples == 3 and job.data.captions == ["a cat 0", "a cat 1", "a cat 2"]


# --- Tiny as it was published


def test_published_tiny_measures_the_third_tap_without_training_it(narrow, tmp_path):
    gradients = {}
    for published in (False, True):
        job = prepared(tmp_path / str(published), **{**narrow, "variant": "bk_tiny"}, published_tiny=published)
        job.begin(resume=False)
        batch = job.batches(job.config)(job.trainer._rng(0, 0, job.data.num_examples))
        values = job.losses(job.student, batch)
        third = "feature/down_blocks.2.attentions.0.proj_out"
        assert values[third] > 0 and values[third].requires_grad == (not published)
        values["loss"].backward()
        gradients[published] = torch.cat([p.grad.flatten() for p in job.student.parameters()])
        gradients[published, "loss"] = values["loss"].item()
    assert gradients[True, "loss"] == gradients[False, "loss"]
    difference = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert 0.001 < difference < 1
    assert isinstance(job.student, UNet2DConditionModel)
    with pytest.raises(ValueError, match="published_tiny"):
        for _ in job.steps():
            pass
        trained(tmp_path / "True", **{**narrow, "variant": "bk_tiny"}, resume=True)
