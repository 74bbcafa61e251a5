"""Notebook 07 on made-up results: what is not comparable is never put together."""

import json

import pandas as pd
import papermill
import pytest

from bksdm_utils.workbook import results as tables
from bksdm_utils.workbook.parameters import find_notebook
from bksdm_utils.workbook.run import fill


def write_run(folder, notebook, metrics, variant="bk_small", **config):
    """What a finished run leaves; the later its folder's name, the later it began."""
    folder.mkdir(parents=True)
    result = {
        "notebook": notebook, "preset": "storybook", "variant": variant,
        "config": fill(find_notebook(notebook)[1], config).model_dump(mode="json"),
        "metrics": {"key_figure": "a|b", **metrics}, "provenance": {"seconds": 1, "started": folder.name},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def write_training(folder, score, **config):
    row = {"clip_score": score, "object": 0.5, "colour": 0.5, "place": 1.0}
    metrics = {"seconds_trained": 60, "steps": 400, "params": 10, "teacher": row, "before": row, "after": row,
               "recovered": row}  # fmt: skip
    write_run(folder, "03_kd_training", metrics, **config)


def write_evaluation(folder, protocol, captions, student, **config):
    models = ("teacher", "bk_small", "random")
    metrics = {
        "protocol": protocol, "num_images": captions, "students": {"bk_small": str(student / "unet_ema")},
        "scores": {model: {"clip_score": [0.5, 0.1], "fid": [1.0, None]} for model in models},
        "unets": {model: {"params": 10, "macs": 20, "latency": 0.1} for model in models},
        "images": {model: {"scored": captions - (model == "bk_small")} for model in models},
    }  # fmt: skip
    write_run(folder, "04_coco_evaluation", metrics, **config)


def write_dreambooth(folder, subject, clip_i, **config):
    scores = {"teacher, before": {"clip_i": [0.1, 0.01]}, "teacher, lora": {"clip_i": [clip_i, 0.01]}}
    metrics = {"subject": subject, "steps": 8, "costs": {"teacher, lora": {}}, "scores": scores}
    write_run(folder, "05_dreambooth", metrics, subject=subject, **config)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    kd, evaluated, dreambooth = (folder / name for name in ("03_kd_training", "04_coco_evaluation", "05_dreambooth"))
    write_training(kd / "a", 0.1)
    write_training(kd / "b", 0.5)  # the same once more: the newer one counts
    write_training(kd / "c", 0.7, seed=1)
    write_training(kd / "d", 0.9, batch_size=8)
    write_evaluation(evaluated / "e", "storybook", 128, kd / "c")
    write_evaluation(evaluated / "f", "clean", 40, kd / "nowhere")
    write_evaluation(evaluated / "h", "storybook", 128, kd / "c", guidance_scale=4)
    write_dreambooth(dreambooth / "g", "dog2", 0.3)
    write_dreambooth(dreambooth / "h", "cat2", 0.5)
    write_dreambooth(dreambooth / "i", "dog2", 0.9, lora_rank=4)
    write_dreambooth(dreambooth / "j", "dog2", 0.7, seed=1)
    return folder


@pytest.fixture(scope="module")
def results(runs_dir):
    results, set_aside = tables.collect(runs_dir)
    assert len(results) == 11 and not set_aside
    return results


def test_results_of_other_versions_and_broken_files_are_set_aside_by_name(tmp_path):
    write_training(tmp_path / "03_kd_training" / "now", 0.5)
    result = json.loads((tmp_path / "03_kd_training" / "now" / "result.json").read_text())
    older = {**result, "config": {**result["config"], "resolved": {}}}
    partial = {name: value for name, value in result.items() if name != "config"}
    for name, text in {"older": json.dumps(older), "partial": json.dumps(partial), "broken": "{", "list": "[]"}.items():
        folder = tmp_path / "03_kd_training" / name
        folder.mkdir()
        (folder / "result.json").write_text(text)
    results, set_aside = tables.collect(tmp_path)
    assert [r["folder"] for r in results] == ["03_kd_training/now"]
    reasons = {path.split("/")[-2]: reason for path, reason in set_aside}
    assert set(reasons) == {"older", "partial", "broken", "list"}
    assert "resolved" in reasons["older"] and "config" in reasons["partial"]


def test_runs_of_every_notebook_are_in_one_table(tmp_path):
    write_run(tmp_path / "00_storybook_world" / "a", "00_storybook_world", {}, variant=None)
    write_training(tmp_path / "03_kd_training" / "b", 0.5)
    rows = tables.table(tables.collect(tmp_path)[0])
    assert list(rows["variant"]) == ["", "bk_small"] and list(rows["key figure"]) == ["a|b"] * 2


def test_settings_are_what_differs_from_the_preset(results):
    settings = {result["folder"]: result["settings"] for result in results}
    assert settings["03_kd_training/c"] == "" and settings["03_kd_training/d"] == "batch_size 8"
    assert settings["04_coco_evaluation/h"] == "guidance_scale 4.0" and settings["05_dreambooth/i"] == "lora_rank 4"


def test_students_are_averaged_over_nothing_but_seeds(results, runs_dir):
    students = tables.students_table(results, runs_dir)
    assert list(students["minutes"]) == [1.0] * 4 and list(students["seed"]) == [0, 0, 1, 0]
    summary = tables.over_seeds(students).set_index("settings")
    assert summary.loc["", "after"] == "0.600 (0.500 to 0.700)" and summary.loc["", "seeds"] == 2
    assert summary.loc["batch_size 8", "after"] == "0.900" and len(summary) == 2


def test_students_have_the_costs_of_their_folder(tmp_path, teacher):
    write_training(tmp_path / "03_kd_training" / "a", 0.5)
    teacher.save_pretrained(tmp_path / "03_kd_training" / "a" / "unet_ema")
    students = tables.students_table(tables.collect(tmp_path)[0], tmp_path)
    assert students.loc[0, "MB"] > 0 and students.loc[0, "GMACs"] > 0


def test_scores_have_their_protocol_number_of_images_and_training_beside_them(results, runs_dir):
    models = tables.models_table(results, tables.students_table(results, runs_dir), runs_dir)
    scores = tables.scores_table(models)
    assert list(scores["images"]) == [128, 127, 128, 40, 39, 40, 128, 127, 128]
    assert list(scores["minutes"]) == ["", "1.0", "", "", "", "", "", "1.0", ""]  # of the student that was scored
    assert list(scores["settings"]) == [""] * 6 + ["guidance_scale 4.0"] * 3
    assert "fid" not in scores and scores["clip_score"].str.startswith("0.5").all()
    figures = {name: groups for name, _, groups in tables.comparisons(models)}
    assert set(figures) == {"tradeoff_0_storybook-clean", "tradeoff_1_storybook-storybook",
                            "tradeoff_2_storybook-storybook"}  # fmt: skip
    assert figures["tradeoff_0_storybook-clean"]["student"]["bk_small"]["parameters"] == 1


def test_subjects_are_averaged_over_equal_runs(results):
    subjects = tables.subjects_table(results).set_index("settings")
    assert list(subjects.loc["", "subject"]) == ["dog2", "cat2", "dog2, seed 1", "mean"]
    assert list(subjects.loc["lora_rank 4", "subject"]) == ["dog2", "mean"]
    assert subjects.loc["", "clip_i"].iloc[-1].startswith("0.50") and len(subjects) == 6


def test_no_runs_give_empty_tables(tmp_path):
    results, _ = tables.collect(tmp_path)
    students = tables.students_table(results, tmp_path)
    models = tables.models_table(results, students, tmp_path)
    empty = (tables.table(results), students, tables.over_seeds(students), tables.scores_table(models),
             tables.subjects_table(results))  # fmt: skip
    assert not any(map(len, empty)) and not list(tables.comparisons(models))
    for rows in empty:
        tables.export(rows, tmp_path / "empty")


def test_tables_are_exported_in_three_formats(tmp_path):
    markdown = tables.export(pd.DataFrame({"key figure": ["a|b", None], "variant": ["bk_small", "x"]}), tmp_path / "t")
    assert markdown == (tmp_path / "t.md").read_text() and "| a\\|b | bk_small |" in markdown and "|  | x |" in markdown
    assert "bk\\_small" in (tmp_path / "t.tex").read_text() and len(pd.read_csv(tmp_path / "t.csv")) == 2


def test_a_table_is_put_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- students -->\nold\n<!-- /students -->\nbelow\n")
    assert tables.rewrite(page, "students", "| new |\n") == 1
    assert page.read_text() == "above\n<!-- students -->\n| new |\n<!-- /students -->\nbelow\n"
    assert tables.rewrite(page, "scores", "| new |\n") == 0


@pytest.mark.slow
def test_the_notebook_writes_every_table_but_never_empties_the_readme(runs_dir, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- students -->\nold\n<!-- /students -->\nbelow\n")

    def run(runs, folder):
        parameters = {"runs_dir": str(runs), "output_dir": str(folder), "readme": str(page)}
        papermill.execute_notebook(str(find_notebook("07")[0]), str(tmp_path / "07.ipynb"), parameters,
                                   progress_bar=False, kernel_name="python3")  # fmt: skip

    run(runs_dir, tmp_path / "out")
    for name in ("results", "students", "scores", "subjects", "published"):
        assert all((tmp_path / "out" / f"{name}.{ending}").exists() for ending in ("csv", "md", "tex"))
    assert (tmp_path / "out" / "published_sd-v1.4.png").exists()
    written = page.read_text()
    assert "0.900" in written and "old" not in written
    with pytest.raises(papermill.PapermillExecutionError, match="there are students for the table"):
        run(tmp_path / "nothing", tmp_path / "empty")
    assert page.read_text() == written
