import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bksdm_utils.engine import Draw, Log, Trainer, TrainingConfig, save_model

CONFIG = TrainingConfig(6, batch_size=4, learning_rate=1e-2, checkpoint_steps=2, lr_schedule="cosine", ema_decay=0.9)
EXAMPLES = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(1)
    return torch.nn.Linear(3, 3)


def loss_function(model, draw):
    noisy = EXAMPLES[draw.indices] + draw.normal(3)
    return {"loss": F.mse_loss(model(noisy), EXAMPLES[draw.indices])}


def trained(folder, config=CONFIG, resume=False):
    trainer = Trainer(model(), config, folder, resume)
    return trainer, [step.floats()["loss"] for step in trainer.steps(loss_function, len(EXAMPLES))]


def test_the_ema_starts_as_a_copy_of_the_model(tmp_path):
    trainer = Trainer(model(), CONFIG, tmp_path)
    assert all(torch.equal(e, p) for e, p in zip(trainer.ema.shadow_params, trainer.model.parameters(), strict=True))


def test_ema_weights_are_lent_and_given_back(tmp_path):
    trainer, _ = trained(tmp_path)
    raw = trainer.model.weight.clone()
    with trainer.ema_weights() as averaged:
        assert torch.equal(averaged.weight, trainer.ema.shadow_params[0]) and not torch.equal(averaged.weight, raw)
    assert torch.equal(trainer.model.weight, raw)


def test_two_runs_of_one_seed_are_equal(tmp_path):
    (one, losses), (other, again) = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert losses == again and torch.equal(one.model.weight, other.model.weight)
    assert losses != trained(tmp_path / "c", replace(CONFIG, seed=1))[1]


def test_a_stopped_and_resumed_run_equals_an_unbroken_one(tmp_path):
    whole, losses = trained(tmp_path / "whole")
    stopped = Trainer(model(), CONFIG, tmp_path / "stopped")
    for step in stopped.steps(loss_function, len(EXAMPLES)):
        if step.step == 5:  # one step after the last checkpoint, which is then done again
            break
    resumed, rest = trained(tmp_path / "stopped", resume=True)
    assert rest == losses[4:]
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.ema.shadow_params[0], whole.ema.shadow_params[0])


def test_resuming_with_another_batch_size_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match='"global_batch_size": \\[4, 2\\]'):
        Trainer(model(), replace(CONFIG, batch_size=2), tmp_path, resume=True)


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer, _ = trained(tmp_path)
    before = trainer.checkpoint.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert trainer.checkpoint.read_bytes() == before


def test_accumulation_draws_what_one_large_batch_draws(tmp_path):
    _, large = trained(tmp_path / "a", replace(CONFIG, batch_size=4))
    _, small = trained(tmp_path / "b", replace(CONFIG, batch_size=1, gradient_accumulation_steps=4))
    assert small == pytest.approx(large, rel=1e-5)


def test_draws_depend_on_step_and_position_alone():
    whole = Draw(0, 3, range(0, 8), 8, 10)
    half = Draw(0, 3, range(4, 8), 8, 10)
    assert whole.indices[4:] == half.indices
    assert torch.equal(whole.normal(2, 2)[4:], half.normal(2, 2))
    assert not torch.equal(Draw(0, 4, range(0, 8), 8, 10).normal(2), Draw(0, 3, range(0, 8), 8, 10).normal(2))


def test_an_epoch_shows_every_example_once():
    seen = [i for step in range(5) for i in Draw(7, step, range(4), 4, 10).indices]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_schedules_count_optimizer_steps():
    config = TrainingConfig(100, learning_rate=1.0, lr_schedule="linear", lr_warmup_steps=9, lr_decay_start=0.5)
    rates = [config.learning_rate_at(step) for step in (0, 9, 50, 75, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"learning_rate": -1.0}, {"max_train_steps": -5}, {"lr_schedule": "cos"}]
)
def test_settings_that_cannot_be_meant_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        replace(CONFIG, **bad)


def test_a_resumed_log_drops_rows_that_are_done_again(tmp_path):
    log = Log(tmp_path / "log.csv")
    for step in range(1, 6):
        log.append({"step": step, "loss": step / 10})
    resumed = Log(tmp_path / "log.csv", step=3)
    resumed.append({"step": 4, "loss": 1.0})
    assert [row["loss"] for row in Log(tmp_path / "log.csv", step=9).rows] == [0.1, 0.2, 0.3, 1.0]


def test_a_model_is_saved_whole_or_not_at_all(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            folder.mkdir()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(Broken(), tmp_path / "unet")
    assert not (tmp_path / "unet").exists()


# --- what goes wrong in long runs -------------------------------------------------------------------------------------


def test_a_step_without_a_finite_gradient_is_left_out_and_counted(tmp_path):
    bad, seen = {2, 3}, []

    def sometimes(model, draw):
        loss = loss_function(model, draw)["loss"]
        return {"loss": loss * float("nan") if draw.step in bad else loss}

    trainer = Trainer(model(), CONFIG, tmp_path)
    for step in trainer.steps(sometimes, len(EXAMPLES)):
        seen.append((step.skipped, trainer.model.weight.clone(), trainer.ema.shadow_params[0].clone()))
    assert [skipped for skipped, *_ in seen] == [False, False, True, True, False, False]
    assert torch.equal(seen[1][1], seen[3][1]) and torch.equal(seen[1][2], seen[3][2])
    assert trainer.model.weight.isfinite().all() and not torch.equal(seen[3][1], seen[5][1])


def test_too_many_such_steps_end_the_run_and_name_the_good_state(tmp_path):
    config = replace(CONFIG, max_train_steps=100, max_skipped_steps=3)
    trainer = Trainer(model(), config, tmp_path)
    broken = lambda m, d: {"loss": loss_function(m, d)["loss"] * (float("inf") if d.step >= 4 else 1)}  # noqa: E731
    with pytest.raises(FloatingPointError, match="4 steps in a row up to step 8.*checkpoint.pt"):
        list(trainer.steps(broken, len(EXAMPLES)))
    assert trainer.model.weight.isfinite().all()


def test_a_resumption_of_another_run_is_refused(tmp_path):
    list(Trainer(model(), CONFIG, tmp_path, fingerprint={"teacher": "a"}).steps(loss_function, len(EXAMPLES)))
    with pytest.raises(ValueError, match='"teacher": \\["a", "b"\\]'):
        Trainer(model(), CONFIG, tmp_path, resume=True, fingerprint={"teacher": "b"})
    with pytest.raises(ValueError, match="stands at step 6, beyond max_train_steps 4"):
        Trainer(model(), replace(CONFIG, max_train_steps=4), tmp_path, resume=True, fingerprint={"teacher": "a"})
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read .*: delete it"):
        Trainer(model(), CONFIG, tmp_path, resume=True)


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("when", ["step", "validation"])
def test_an_interruption_ends_the_step_writes_a_checkpoint_and_loses_nothing(signum, raised, when, tmp_path):
    whole, _ = trained(tmp_path / "whole")
    before = signal.getsignal(signum)

    def interrupted(model, draw):
        if draw.step == 2 and when == "step":
            signal.raise_signal(signum)
        return loss_function(model, draw)

    trainer = Trainer(model(), CONFIG, tmp_path / "cut")
    with pytest.raises(raised):
        for step in trainer.steps(interrupted, len(EXAMPLES)):
            if step.step == 3 and when == "validation":
                signal.raise_signal(signum)
    assert trainer.step == 3 and signal.getsignal(signum) == before
    resumed = Trainer(model(), CONFIG, tmp_path / "cut", resume=True)
    assert resumed.step == 3
    list(resumed.steps(loss_function, len(EXAMPLES)))
    assert torch.equal(resumed.model.weight, whole.model.weight)


PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from pathlib import Path
import torch
from test_engine import CONFIG, EXAMPLES, Trainer, loss_function, model
folder, batch_size, steps = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
trainer = Trainer(model(), replace(CONFIG, batch_size=batch_size), folder, resume=True)
losses = []
for step in trainer.steps(loss_function, len(EXAMPLES)):
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
    arguments = [str(Path(__file__).parent), str(folder), str(4 // count), str(steps)]
    done = subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / f"losses_{steps}.json").read_text())


def test_one_process_and_two_and_a_run_moved_between_them_learn_the_same(tmp_path):
    whole, losses = trained(tmp_path / "whole")
    assert run_processes(2, tmp_path / "two", 6) == pytest.approx(losses, abs=1e-5)
    moved = [run_processes(count, tmp_path / "moved", steps) for count, steps in ((1, 2), (2, 4), (1, 6))]
    assert sum(moved, []) == pytest.approx(losses, abs=1e-5)
    resumed = Trainer(model(), CONFIG, tmp_path / "moved", resume=True)
    assert torch.allclose(resumed.model.weight, whole.model.weight, atol=1e-5)
    assert torch.allclose(resumed.ema.shadow_params[0], whole.ema.shadow_params[0], atol=1e-5)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_engine import EXAMPLES, KILLED, Trainer, loss_function, model
from bksdm_utils.engine import Log
folder = Path(sys.argv[2])
trainer = Trainer(model(), KILLED, folder, resume=True)
log = Log(folder / "log.csv", trainer.step)
for step in trainer.steps(loss_function, len(EXAMPLES)):
    log.append({"step": step.step, "loss": step.floats()["loss"]})
trainer.save()
"""
KILLED = replace(CONFIG, max_train_steps=400, checkpoint_steps=1)


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL at random moments, most of them while a checkpoint or the log is being written."""
    whole, losses = trained(tmp_path / "whole", KILLED)
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "killed")]
    chance, kills = random.Random(0), 0
    for _ in range(30):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        checkpoint = tmp_path / "killed" / "checkpoint.pt"
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while child.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == stamp):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))  # somewhere in the first steps after it got going
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
    assert [row["loss"] for row in Log(tmp_path / "killed" / "log.csv", step=400).rows] == pytest.approx(losses, abs=0)
