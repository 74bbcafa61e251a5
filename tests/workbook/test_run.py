"""Start and finish of a run."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from bksdm_utils.config.training import KDTraining
from bksdm_utils.files import NotAvailable
from bksdm_utils.workbook import run as run_module
from bksdm_utils.workbook.parameters import CLASSES, parameters_cell
from bksdm_utils.workbook.run import check, choose_device, folder_name, run_name, start


def variables(number="03", **changes):
    names = {}
    exec(parameters_cell(CLASSES[number]), names)
    return {**{name: names[name] for name in CLASSES[number].model_fields}, **changes}


def test_a_run_has_a_folder_a_plan_and_a_config_that_reads_back(tmp_path, capsys):
    run = start(KDTraining, variables(output_dir=str(tmp_path), batch_size="4", device="cpu"))
    assert (run.variant, run.device, run.config.batch_size, run.config.max_train_steps) == ("bk_small", "cpu", 4, 400)
    assert KDTraining(**json.loads((tmp_path / "config.json").read_text())) == run.config
    line = capsys.readouterr().out
    assert "storybook-bk_small on cpu" in line and "torch" in line and "commit" in line


def test_the_result_says_what_ran(tmp_path):
    run = start(KDTraining, variables(output_dir=str(tmp_path), learning_rate=2e-4))
    run.finish({"loss": float("nan")}, "a figure")
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"notebook", "preset", "variant", "config", "metrics", "provenance"}
    assert KDTraining(**result["config"]) == run.config and result["config"]["learning_rate"] == 2e-4
    assert result["metrics"] == {"key_figure": "a figure", "loss": None}


def test_an_older_result_does_not_pass_for_a_new_one(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    start(KDTraining, variables(output_dir=str(tmp_path)))
    assert not (tmp_path / "result.json").exists()


def test_an_unsaved_edit_of_the_cell_counts_and_a_misspelt_name_is_refused(tmp_path):
    sources = ["", parameters_cell(KDTraining) + "\nbatchsize = 3"]
    with pytest.raises(ValueError, match="batchsize .did you mean batch_size"):
        start(KDTraining, variables(output_dir=str(tmp_path), In=sources, batchsize=3))
    missing = variables(output_dir=str(tmp_path))
    del missing["lambda_sd"]
    with pytest.raises(ValueError, match="lacks lambda_sd"):
        start(KDTraining, missing)


@pytest.mark.parametrize(
    ("changes", "standard"),
    [({}, True), ({"variant": "bk_tiny"}, True), ({"device": "cpu"}, True), ({"batch_size": 8}, False),
     ({"seed": 1}, False), ({"preset": "sd-v1.4"}, False)],
)  # fmt: skip
def test_claims_are_about_standard_runs(changes, standard, tmp_path):
    assert start(KDTraining, variables(output_dir=str(tmp_path), **changes)).standard is standard


def test_a_plan_of_ones_own_is_no_standard_run(tmp_path):
    plan = {"name": "mine", "stages": [{"down": [0, 1], "up": [0, 1, 2]}] * 3, "mid": False}
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    run = start(KDTraining, variables(output_dir=str(tmp_path / "run"), variant=str(tmp_path / "mine.json")))
    assert run.variant == "mine" and not run.standard


@pytest.mark.parametrize("variant", ["bk_huge", "missing.json"])
def test_an_unknown_variant_is_refused_before_anything_is_loaded(variant, tmp_path):
    with pytest.raises(ValueError, match=variant):
        start(KDTraining, variables(output_dir=str(tmp_path), variant=variant))


def test_folder_names_are_safe_and_limited_in_bytes():
    assert (
        folder_name("storybook", "bk_small") == "storybook-bk_small" and folder_name("storybook", None) == "storybook"
    )
    assert folder_name("storybook", "../a b/c") == "storybook-.._a_b_c"
    long = folder_name("storybook", "ü" * 400)
    assert len(long.encode()) <= 150 and long != folder_name("storybook", "ü" * 401)


def test_a_named_subject_and_what_is_swept_are_in_the_folders_name():
    kind = CLASSES["05"]
    assert run_name(kind.filled()) == "storybook-bk_small"
    assert run_name(kind.filled(subject="tabby")) == "storybook-bk_small-subject_tabby"
    assert run_name(KDTraining.filled(seed=3), ["seed"]) == "storybook-bk_small-seed_3"


def test_devices_are_checked(monkeypatch):
    torch = SimpleNamespace(__version__="2", cuda=SimpleNamespace(is_available=lambda: False),
                            backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True)))  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "torch", torch)
    assert choose_device("auto") == "mps" and choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="'cuda'.*auto or mps, cpu"):
        choose_device("cuda")


def test_what_is_not_available_is_skipped_only_where_it_was_never_run(tmp_path, capsys):
    def missing():
        raise NotAvailable("no weights: fetch them")

    run = start(KDTraining, variables(output_dir=str(tmp_path), preset="sd-v1.4"))
    assert run.if_available(missing) is None and "fetch them" in capsys.readouterr().out
    run = start(KDTraining, variables(output_dir=str(tmp_path)))
    with pytest.raises(NotAvailable):
        run.if_available(missing)


def test_the_commit_is_the_projects_own(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(run_module, "ROOT", (tmp_path / "inner").resolve())
    assert run_module._commit() == "unknown"


def test_a_check_prints_what_it_proved_or_fails(capsys):
    check(True, "two and two are four")
    assert "two and two are four" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="does not hold: five"):
        check(0, "five")
