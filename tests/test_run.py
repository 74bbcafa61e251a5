import json

import nbformat
import pytest

from bksdm_utils.core.plans import plan_of
from bksdm_utils.workbook.headless import main, plan_jobs
from bksdm_utils.workbook.parameters import LISTS, NOTEBOOKS, find_notebook, literal, parameters_of
from bksdm_utils.workbook.run import changed, check, collect, run_name, start


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder with one notebook that works when `number` is positive."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    parameters = nbformat.v4.new_code_cell(
        'preset = "storybook"  # a preset\nvariant = "bk_small"  # a variant\n'
        "number = 1  # any\noutput_dir = None  # folder"
    )
    parameters.metadata["tags"] = ["parameters"]
    body = nbformat.v4.new_code_cell(
        'import json, pathlib\nassert number > 0, "number must be positive"\nprint("working with", number)\n'
        'result = {"metrics": {"key_figure": f"{variant} {number}"}}\n'
        '(pathlib.Path(output_dir) / "result.json").write_text(json.dumps(result))'
    )
    notebook.cells = [parameters, body]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "42_answer.ipynb")
    monkeypatch.setattr("bksdm_utils.workbook.parameters.NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr("bksdm_utils.files.ROOT", tmp_path)
    return tmp_path


def test_a_number_finds_its_notebook(notebooks):
    assert find_notebook("42").name == find_notebook("42_answer").name == "42_answer.ipynb"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["41"], "expected all or one of 42_answer"),
        (["42", "-p", "nubmer", "1"], "it knows preset, variant, number, output_dir"),
        (["42", "-p", "variant", "bk_small,bk_huge"], "expected one of bk_base, bk_small, bk_tiny"),
        (["42", "-p", "preset", "sd-v9"], "expected one of storybook, sd-v1.4"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_runs(notebooks, arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (notebooks / "outputs").exists()


def test_a_sweep_runs_every_value_and_goes_on_after_a_failure(notebooks, capfd):
    assert main(["42", "-p", "number", "1,-1,2"]) == 1
    folders = notebooks / "outputs" / "42_answer"
    printed = capfd.readouterr().out
    assert "working with 2" in printed and "number must be positive" in printed
    assert printed.count("FAILED") == 2 and "bk_small 2" in printed
    good, bad = folders / "storybook-bk_small-number_2", folders / "storybook-bk_small-number_-1"
    assert json.loads((good / "result.json").read_text())["metrics"]["key_figure"] == "bk_small 2"
    assert (good / "42_answer.html").exists() and (bad / "42_answer.ipynb").exists()
    assert not (bad / "result.json").exists()


def test_commas_are_part_of_a_list(notebooks, monkeypatch):
    monkeypatch.setattr("bksdm_utils.workbook.parameters.LISTS", ("number",))
    assert [job.parameters["number"] for job in plan_jobs(["42"], [("number", "1,2;3;none")])] == [
        "1,2", "3", None]  # fmt: skip
    assert [job.parameters["number"] for job in plan_jobs(["42"], [("number", "1,2")])] == ["1,2"]
    monkeypatch.undo()
    known = {name for path in NOTEBOOKS.glob("0*.ipynb") for name in parameters_of(path)}
    assert set(LISTS) <= known


def test_every_subject_has_a_folder_of_its_own():
    names = [plan_jobs(["05"], [("subject", subject)])[0].dir.name for subject in ("koi", "my/dog", "my/dog,koi")]
    assert names == ["storybook-bk_small-subject_koi", "storybook-bk_small-subject_my_dog",
                     "storybook-bk_small-subject_my_dog"]  # fmt: skip
    assert run_name(parameters_of(find_notebook("05"))) == "storybook-bk_small"


def test_what_was_changed_is_told():
    config = parameters_of(find_notebook("05")) | {"lora_rank": 4, "seed": 1, "resolved": {}}
    assert changed({"notebook": "05_dreambooth", "config": config}, free=["seed"]) == "lora_rank 4"


def test_variants_are_swept_into_the_folders_of_the_design(notebooks):
    jobs = plan_jobs(["42"], [("variant", "bk_base,bk_tiny")])
    assert [job.dir.name for job in jobs] == ["storybook-bk_base", "storybook-bk_tiny"]


def test_an_own_plan_names_its_folder(notebooks):
    (notebooks / "mine.json").write_text(plan_of("my plan", mid=False).to_json())
    jobs = plan_jobs(["42"], [("variant", f"{notebooks}/mine.json,sd_small")])
    assert [job.dir.name for job in jobs] == ["storybook-my_plan", "storybook-bk_base"]


def test_the_preset_decides_the_variant(tmp_path):
    values = parameters_of(find_notebook("02")) | {"output_dir": str(tmp_path)}
    assert start("02_weight_copying", values).plan.name == "bk_small"
    started = start("02_weight_copying", values | {"preset": "sdxl-base"})
    assert started.variant == "koala_700m" and not started.standard
    assert plan_jobs(["02"], [("preset", "sdxl-base")])[0].dir.name == "sdxl-base-koala_700m"


def test_values_are_read_as_python_reads_them():
    assert [literal(v) for v in ("8", "1e-4", "true", "None", "bk_tiny", "data/x")] == [
        8,
        1e-4,
        True,
        None,
        "bk_tiny",
        "data/x",
    ]


def test_start_refuses_bad_numbers_and_forgets_old_results(tmp_path):
    values = parameters_of(find_notebook("03")) | {"output_dir": str(tmp_path)}
    (tmp_path / "result.json").write_text("{}")
    started = start("03_kd_training", values)
    assert not (tmp_path / "result.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["resolved"]["name"] == "storybook"
    started.finish({"score": 1.0}, key_figure="one")
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"notebook", "preset", "variant", "config", "metrics", "provenance"}
    for bad in ({"batch_size": -1}, {"learning_rate": 0}, {"lambda_sd": -1.0}, {"resolution": 100}, {"seed": -1},
                {"batch_size": "many"}, {"num_inference_steps": 2}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            start("03_kd_training", values | bad)


def test_broken_results_are_set_aside(tmp_path):
    for name, text in {"a": "{", "b": "{}", "c": json.dumps(dict.fromkeys(
        ("notebook", "preset", "variant", "config", "metrics", "provenance"), "x"))}.items():  # fmt: skip
        (tmp_path / "03_kd_training" / name).mkdir(parents=True)
        (tmp_path / "03_kd_training" / name / "result.json").write_text(text)
    results, unreadable = collect(tmp_path)
    assert [r["folder"] for r in results] == ["03_kd_training/c"] and len(unreadable) == 2


def test_a_check_says_what_it_proved_or_fails(capsys):
    check(True, "one is one")
    assert "✓ one is one" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="does not hold: one is two"):
        check(False, "one is two")
