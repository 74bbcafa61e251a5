"""Nothing overwrites a trained student by accident."""

import json

import pytest
from click.testing import CliRunner

from bksdm_utils.config.training import KDTraining
from bksdm_utils.files import write_json
from bksdm_utils.workbook import headless
from bksdm_utils.workbook.cli import main
from bksdm_utils.workbook.protection import check_folder

LONG = KDTraining.filled(max_train_steps=40, learning_rate=1e-3)


def trained(folder, config=LONG, steps=40):
    """What a run of `steps` steps leaves."""
    (folder / "unet_ema").mkdir(parents=True)
    (folder / "checkpoints" / f"step_{steps:08}").mkdir(parents=True)
    for name in ("unet_ema/config.json", f"checkpoints/step_{steps:08}/step.json", "03_kd_training.ipynb"):
        (folder / name).write_text("the long run's")
    write_json(folder / "config.json", config.model_dump(mode="json"))
    (folder / "log.csv").write_text("step,loss\n" + "".join(f"{i},0.5\n" for i in range(1, steps + 1)))
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"max_train_steps": 4}, "trained for 40 steps; max_train_steps is 4"),
     ({"learning_rate": 2e-3}, "learning_rate.*0.001, 0.002"), ({"seed": 1}, "seed.*0, 1"),
     ({"train_data_dir": "photos"}, "train_data_dir"), ({"variant": "bk_tiny"}, "variant"),
     ({"batch_size": 8}, "images of a step"), ({"lambda_kd_feat": 0.0}, "lambda_kd_feat")],
)  # fmt: skip
def test_another_or_a_longer_run_is_refused(changes, said, tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        check_folder(LONG.but(**changes), tmp_path)
    assert "output_dir" in str(error.value) and "resume=True" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_train_steps": 80}, {"resume": True, "max_train_steps": 4}, {"num_images": 4}, {"ablation_steps": 0},
     {"compiled": False}, {"device": "cpu"}, {"batch_size": 8, "gradient_accumulation_steps": 2}],
)  # fmt: skip
def test_the_same_run_may_be_repeated_lengthened_and_resumed(changes, tmp_path):
    trained(tmp_path)
    check_folder(LONG.but(**changes), tmp_path)


def test_an_interrupted_run_is_not_begun_anew(tmp_path):
    trained(tmp_path, steps=30)
    with pytest.raises(ValueError, match="interrupted at step 30 of 40"):
        check_folder(LONG, tmp_path)


def test_weights_of_unknown_settings_are_kept(tmp_path):
    trained(tmp_path)
    (tmp_path / "config.json").write_text('{"preset": "stor')
    with pytest.raises(ValueError, match="config.json.*not readable"):
        check_folder(LONG, tmp_path)


def test_a_folder_without_weights_is_free(tmp_path):
    write_json(tmp_path / "config.json", LONG.but(seed=1).model_dump(mode="json"))
    check_folder(LONG, tmp_path)


def test_a_toy_run_beside_a_long_one_leaves_every_file_as_it_was(tmp_path, capsys):
    before = trained(tmp_path)
    toy = {"max_train_steps": 2, "learning_rate": "1e-3", "output_dir": str(tmp_path)}
    assert headless.run_jobs(headless.plan_jobs(["03"], toy)) == 1
    assert "REFUSED" in (printed := capsys.readouterr().out) and "trained for 40 steps" in printed
    arguments = [part for name, value in toy.items() if name != "output_dir" for part in ("-p", name, str(value))]
    result = CliRunner().invoke(main, ["train", str(tmp_path), *arguments])
    assert result.exit_code == 1 and "trained for 40 steps" in result.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert json.loads(before[tmp_path / "config.json"])["max_train_steps"] == 40


def test_of_several_processes_the_first_one_looks(tmp_path, monkeypatch):
    """It may have written its configuration before another looks, which would take its run for an interrupted one."""
    trained(tmp_path, LONG.but(max_train_steps=80))
    ran = []
    monkeypatch.setattr("bksdm_utils.workbook.jobs.run_job", lambda config, folder: ran.append(config.max_train_steps))
    command = ["train", "--config", str(tmp_path / "config.json")]
    assert CliRunner().invoke(main, command).exit_code == 1
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(main, command).exit_code == 0 and ran == [80]
