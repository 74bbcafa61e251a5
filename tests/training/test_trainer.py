import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import disk_full_beyond

from bksdm_utils.config.training import Training
from bksdm_utils.files import CsvLog
from bksdm_utils.models.saving import save_model
from bksdm_utils.training.micro_batch import find_micro_batch
from bksdm_utils.training.rng import BatchRng
from bksdm_utils.training.trainer import Trainer

CONFIG = Training(
    max_train_steps=6, batch_size=4, learning_rate=1e-2, checkpoint_steps=2, lr_schedule="cosine", ema_decay=0.9
)  # fmt: skip
EXAMPLES = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(1)
    return torch.nn.Linear(3, 3)


class Batches:
    """Batches that are the random numbers themselves."""

    num_examples = len(EXAMPLES)

    def __call__(self, rng):
        return rng


BATCHES = Batches()


def loss_function(model, batch):
    noisy = EXAMPLES[batch.indices] + batch.normal(3)
    return {"loss": F.mse_loss(model(noisy), EXAMPLES[batch.indices])}


def trained(folder, config=CONFIG, resume=False):
    trainer = Trainer(model(), config, folder, resume)
    return trainer, [step.floats()["loss"] for step in trainer.steps(loss_function, BATCHES)]


def test_the_ema_starts_as_a_copy_of_the_model(tmp_path):
    trainer = Trainer(model(), CONFIG, tmp_path)
    assert all(torch.equal(e, p) for e, p in zip(trainer.ema.shadow_params, trainer.model.parameters(), strict=True))


def test_ema_weights_are_used_within_the_block_only(tmp_path):
    trainer, _ = trained(tmp_path)
    raw = trainer.model.weight.clone()
    with trainer.ema_weights() as averaged:
        assert torch.equal(averaged.weight, trainer.ema.shadow_params[0]) and not torch.equal(averaged.weight, raw)
    assert torch.equal(trainer.model.weight, raw)


def test_two_runs_of_one_seed_are_equal(tmp_path):
    (one, losses), (other, again) = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert losses == again and torch.equal(one.model.weight, other.model.weight)
    assert losses != trained(tmp_path / "c", CONFIG.but(seed=1))[1]


def test_a_stopped_and_resumed_run_equals_an_unbroken_one(tmp_path):
    whole, losses = trained(tmp_path / "whole")
    stopped = Trainer(model(), CONFIG, tmp_path / "stopped")
    for step in stopped.steps(loss_function, BATCHES):
        if step.step == 5:  # one step after the last checkpoint, which is then done again
            break
    resumed, rest = trained(tmp_path / "stopped", resume=True)
    assert rest == losses[4:]
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.ema.shadow_params[0], whole.ema.shadow_params[0])


def test_resuming_with_another_batch_size_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match='"global_batch_size": \\[4, 2\\]'):
        Trainer(model(), CONFIG.but(batch_size=2), tmp_path, resume=True)


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer, _ = trained(tmp_path)
    before = {path: path.read_bytes() for path in trainer.checkpoints.newest.rglob("*") if path.is_file()}
    trainer.step += 1
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert {path: path.read_bytes() for path in trainer.checkpoints.newest.rglob("*") if path.is_file()} == before


def test_accumulation_equals_one_large_batch(tmp_path):
    _, large = trained(tmp_path / "a", CONFIG.but(batch_size=4))
    _, small = trained(tmp_path / "b", CONFIG.but(batch_size=1, gradient_accumulation_steps=4))
    assert small == pytest.approx(large, rel=1e-5)


def test_random_numbers_depend_on_step_and_position_only():
    whole = BatchRng(0, 3, range(0, 8), 8, 10)
    half = BatchRng(0, 3, range(4, 8), 8, 10)
    assert whole.indices[4:] == half.indices
    assert torch.equal(whole.normal(2, 2)[4:], half.normal(2, 2))
    assert not torch.equal(BatchRng(0, 4, range(0, 8), 8, 10).normal(2), BatchRng(0, 3, range(0, 8), 8, 10).normal(2))


def test_an_epoch_shows_every_example_once():
    seen = [i for step in range(5) for i in BatchRng(7, step, range(4), 4, 10).indices]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_schedules_count_optimizer_steps():
    config = Training(
        max_train_steps=100, learning_rate=1.0, lr_schedule="linear", lr_warmup_steps=9, lr_decay_start=0.5
    )
    rates = [config.learning_rate_at(step) for step in (0, 9, 50, 75, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"learning_rate": -1.0}, {"max_train_steps": -5}, {"lr_schedule": "cos"}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        CONFIG.but(**bad)


def test_a_resumed_log_drops_rows_that_are_done_again(tmp_path):
    log = CsvLog(tmp_path / "log.csv")
    for step in range(1, 6):
        log.append({"step": step, "loss": step / 10})
    resumed = CsvLog(tmp_path / "log.csv", step=3)
    resumed.append({"step": 4, "loss": 1.0})
    assert [row["loss"] for row in CsvLog(tmp_path / "log.csv", step=9).rows] == [0.1, 0.2, 0.3, 1.0]


def test_a_model_is_saved_completely_or_not_at_all(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            folder.mkdir()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(Broken(), tmp_path / "unet")
    assert not (tmp_path / "unet").exists()


def test_a_step_without_a_finite_gradient_is_left_out_and_counted(tmp_path):
    bad, seen = {2, 3}, []

    def sometimes(model, batch):
        loss = loss_function(model, batch)["loss"]
        return {"loss": loss * float("nan") if batch.step in bad else loss}

    trainer = Trainer(model(), CONFIG, tmp_path)
    for step in trainer.steps(sometimes, BATCHES):
        seen.append((step.skipped, trainer.model.weight.clone(), trainer.ema.shadow_params[0].clone()))
    assert [skipped for skipped, *_ in seen] == [False, False, True, True, False, False]
    assert torch.equal(seen[1][1], seen[3][1]) and torch.equal(seen[1][2], seen[3][2])
    assert trainer.model.weight.isfinite().all() and not torch.equal(seen[3][1], seen[5][1])


def test_too_many_such_steps_abort_the_run_and_name_the_last_checkpoint(tmp_path):
    config = CONFIG.but(max_train_steps=100, max_skipped_steps=3)
    trainer = Trainer(model(), config, tmp_path)
    broken = lambda m, b: {"loss": loss_function(m, b)["loss"] * (float("inf") if b.step >= 4 else 1)}  # noqa: E731
    with pytest.raises(FloatingPointError, match="4 consecutive steps up to step 8.*step_0000000[68]"):
        list(trainer.steps(broken, BATCHES))
    assert trainer.model.weight.isfinite().all()


def test_a_resumption_of_another_run_is_refused(tmp_path):
    list(Trainer(model(), CONFIG, tmp_path, fingerprint={"teacher": "a"}).steps(loss_function, BATCHES))
    with pytest.raises(ValueError, match='"teacher": \\["a", "b"\\]'):
        Trainer(model(), CONFIG, tmp_path, resume=True, fingerprint={"teacher": "b"})
    with pytest.raises(ValueError, match="has step 6, beyond max_train_steps 4"):
        Trainer(model(), CONFIG.but(max_train_steps=4), tmp_path, resume=True, fingerprint={"teacher": "a"})
    (tmp_path / "checkpoints" / "step_00000006" / "optimizer.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="could not be read .*: delete it"):
        Trainer(model(), CONFIG, tmp_path, resume=True)


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("when", ["step", "validation"])
def test_an_interruption_ends_the_step_writes_a_checkpoint_and_loses_nothing(signum, raised, when, tmp_path):
    whole, _ = trained(tmp_path / "whole")
    before = signal.getsignal(signum)

    def interrupted(model, batch):
        if batch.step == 2 and when == "step":
            signal.raise_signal(signum)
        return loss_function(model, batch)

    trainer = Trainer(model(), CONFIG, tmp_path / "cut")
    with pytest.raises(raised):
        for step in trainer.steps(interrupted, BATCHES):
            if step.step == 3 and when == "validation":
                signal.raise_signal(signum)
    assert trainer.step == 3 and signal.getsignal(signum) == before
    resumed = Trainer(model(), CONFIG, tmp_path / "cut", resume=True)
    assert resumed.step == 3
    list(resumed.steps(loss_function, BATCHES))
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_processes_share_the_global_batch_whatever_their_number():
    config = Training(max_train_steps=1, batch_size=8, gradient_accumulation_steps=3)
    assert [config.micro_batches(n) for n in (1, 2, 3, 4, 6, 12)] == [(8, 3), (6, 2), (8, 1), (6, 1), (4, 1), (2, 1)]
    with pytest.raises(ValueError, match="5 processes cannot share a global batch of 24"):
        config.micro_batches(5)


def test_the_search_for_a_micro_batch_trains_nothing_and_keeps_the_global_batch(tmp_path):
    _, losses = trained(tmp_path / "a")
    trainer = Trainer(model(), CONFIG, tmp_path / "b")
    rates = find_micro_batch(trainer, loss_function, BATCHES)
    assert set(rates) <= {1, 2, 4} and trainer.micro_batch_size == max(rates, key=rates.get)
    assert trainer.micro_batch_size * trainer.num_micro_batches == CONFIG.global_batch_size and trainer.step == 0
    again = [step.floats()["loss"] for step in trainer.steps(loss_function, BATCHES)]
    assert again == pytest.approx(losses, rel=1e-5)


def test_a_size_that_does_not_fit_ends_the_search(tmp_path):
    def out_of_memory(model, batch):
        if len(batch.positions) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss_function(model, batch)

    trainer = Trainer(model(), CONFIG, tmp_path)
    assert list(find_micro_batch(trainer, out_of_memory, BATCHES)) == [1] and trainer.num_micro_batches == 4
    broken = lambda model, batch: 1 / 0  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        find_micro_batch(trainer, broken, BATCHES)


def test_averaged_weights_on_another_device_are_the_same(tmp_path):
    beside, _ = trained(tmp_path / "a")
    apart, _ = trained(tmp_path / "b", CONFIG.but(ema_device="cpu"))
    assert torch.equal(beside.ema.shadow_params[0], apart.ema.shadow_params[0])


def test_checkpoints_are_complete_few_and_described(tmp_path):
    trainer = Trainer(model(), CONFIG.but(checkpoint_steps=1), tmp_path, name="unet")
    for step in trainer.steps(loss_function, BATCHES):
        trainer.scores = {"clip_score": step.step / 10}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000005", "step_00000006"]
    assert {path.name for path in trainer.checkpoints.newest.iterdir()} == {
        "unet",
        "unet_ema",
        "optimizer.pt",
        "step.json",
    }
    info = json.loads((trainer.checkpoints.newest / "step.json").read_text())
    assert info["step"] == 6 and info["scores"] == {"clip_score": 0.6}


def test_starting_anew_sets_older_checkpoints_aside(tmp_path):
    trained(tmp_path)
    trainer = Trainer(model(), CONFIG, tmp_path)
    assert (
        trainer.checkpoints.newest is None and (tmp_path / "checkpoints.old" / "step_00000006" / "step.json").exists()
    )


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tmp_path, capsys):
    _, losses = trained(tmp_path / "whole")
    trainer, seen = Trainer(model(), CONFIG, tmp_path / "full"), []
    for step in trainer.steps(loss_function, BATCHES):
        seen.append(step.floats()["loss"])
        if step.step == 3:
            with disk_full_beyond(1000), pytest.raises(OSError, match="step 3 could not.*step_00000002 is untouched"):
                trainer.save()
        if step.step == 4:
            full = disk_full_beyond(1000)
            full.__enter__()
        if step.step == 5:
            full.__exit__(None, None, None)
            assert trainer.checkpoints.newest.name == "step_00000002"
    assert seen == losses and trainer.checkpoints.newest.name == "step_00000006"
    assert "warning: the checkpoint of step 4 could not be written" in capsys.readouterr().out


def test_too_little_disk_is_reported_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match="checkpoints: .* GB needed"):
        next(Trainer(model(), CONFIG, tmp_path).steps(loss_function, BATCHES))


def test_two_runs_never_write_to_one_folder(tmp_path):
    script = "import sys; from pathlib import Path; from bksdm_utils.files import folder_lock\n"
    script += "with folder_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    trainer = Trainer(model(), CONFIG, tmp_path)
    with pytest.raises(ValueError, match="another run writes to"):
        next(trainer.steps(loss_function, BATCHES))
    other.kill()
    other.wait()
    assert len(list(trainer.steps(loss_function, BATCHES))) == 6


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, losses = Trainer(model(), CONFIG.but(trackers=("tensorboard",)), tmp_path), []
    for step in trainer.steps(loss_function, BATCHES):
        losses.append(step.floats()["loss"])
        trainer.track(step.floats())
    events = EventAccumulator(str(tmp_path / "bksdm")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses)
    assert [e.step for e in events.Scalars("images_per_second")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"trackers": ("mlflow",)}, "trackers is"), ({"optimizer": "lion"}, "optimizer is 'lion'")],
)
def test_unknown_trackers_and_optimizers_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        CONFIG.but(**settings)


def test_without_bitsandbytes_its_optimizer_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install 'bksdm_utils\\[gpu\\]'"):
        Trainer(model(), CONFIG.but(optimizer="adamw_8bit"), tmp_path)


PROCESS = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import torch
from test_trainer import BATCHES, CONFIG, EXAMPLES, Trainer, loss_function, model
folder, steps = Path(sys.argv[2]), int(sys.argv[3])
trainer = Trainer(model(), CONFIG, folder, resume=True)
losses = []
for step in trainer.steps(loss_function, BATCHES):
    losses.append(step.floats()["loss"])
    if trainer.step == steps:
        break
if trainer.accelerator.is_main_process:
    trainer.save()
    (folder / f"losses_{steps}.json").write_text(json.dumps(losses))
trainer.accelerator.wait_for_everyone()
"""


def run_processes(count, folder, steps):
    """Trains up to `steps` with `count` processes that share the global batch of four."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    script = folder / "process.py"
    folder.mkdir(exist_ok=True)
    script.write_text(PROCESS)
    arguments = [str(Path(__file__).parent), str(folder), str(steps)]
    done = subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / f"losses_{steps}.json").read_text())


@pytest.mark.slow
def test_one_process_and_two_and_a_run_moved_between_them_give_the_same(tmp_path):
    whole, losses = trained(tmp_path / "whole")
    assert run_processes(2, tmp_path / "two", 6) == pytest.approx(losses, abs=1e-5)
    moved = [run_processes(count, tmp_path / "moved", steps) for count, steps in ((1, 2), (2, 4), (1, 6))]
    assert sum(moved, []) == pytest.approx(losses, abs=1e-5)
    resumed = Trainer(model(), CONFIG, tmp_path / "moved", resume=True)
    assert torch.allclose(resumed.model.weight, whole.model.weight, atol=1e-5)
    assert torch.allclose(resumed.ema.shadow_params[0], whole.ema.shadow_params[0], atol=1e-5)


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from test_trainer import BATCHES, KILLED, Trainer, loss_function, model
from bksdm_utils.files import CsvLog
folder = Path(sys.argv[2])
trainer = Trainer(model(), KILLED, folder, resume=True)
log = CsvLog(folder / "log.csv", trainer.step)
for step in trainer.steps(loss_function, BATCHES):
    log.append({"step": step.step, "loss": step.floats()["loss"]})
trainer.save()
"""
KILLED = CONFIG.but(max_train_steps=400, checkpoint_steps=1)


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_an_unbroken_one(tmp_path):
    """SIGKILL at random moments, most of them while a checkpoint or the log is being written."""
    whole, losses = trained(tmp_path / "whole", KILLED)
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "killed")]
    rng, kills = random.Random(0), 0
    for _ in range(30):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        log = tmp_path / "killed" / "log.csv"
        stamp = log.stat().st_mtime_ns if log.exists() else 0
        while child.poll() is None and (not log.exists() or log.stat().st_mtime_ns == stamp):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))  # somewhere in the first steps after it got going
        if child.poll() is not None:
            break
        child.kill()
        child.wait()
        kills += 1
        if kills == 3:
            assert subprocess.run(command, capture_output=True).returncode == 0
            break
    resumed = Trainer(model(), KILLED, tmp_path / "killed", resume=True)
    assert kills >= 2 and resumed.step == 400
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.ema.shadow_params[0], whole.ema.shadow_params[0])
    assert [row["loss"] for row in CsvLog(tmp_path / "killed" / "log.csv", step=400).rows] == pytest.approx(
        losses, abs=0
    )
