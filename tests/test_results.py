"""Notebook 07 on results that were made up: what is not comparable is never put together."""

import json

import pandas as pd
import papermill
import pytest

from bksdm_utils.workbook.parameters import find_notebook, parameters_of


def a_run(folder, notebook, config, metrics):
    """What a finished run leaves; the later its folder's name, the later it began."""
    folder.mkdir(parents=True)
    about = {
        "notebook": notebook, "preset": "storybook", "variant": "bk_small",
        "config": parameters_of(find_notebook(notebook)) | config, "metrics": {"key_figure": "a|b"} | metrics,
        "provenance": {"seconds": 1, "started": folder.name},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(about))


def a_training(folder, score, **config):
    row = {"clip_score": score, "object": 0.5, "colour": 0.5, "place": 1.0}
    metrics = {"seconds_trained": 60, "steps": 400, "params": 10, "teacher": row, "before": row, "after": row,
               "recovered": row}  # fmt: skip
    a_run(folder, "03_kd_training", {"seed": 0} | config, metrics)


def an_evaluation(folder, protocol, captions, student, **config):
    models = ("teacher", "bk_small", "random")
    metrics = {
        "protocol": protocol, "num_images": captions, "students": {"bk_small": str(student / "unet_ema")},
        "scores": {model: {"clip_score": [0.5, 0.1]} for model in models},
        "unets": {model: {"params": 10, "macs": 20, "latency": 0.1} for model in models},
        "pictures": {model: {"scored": captions - (model == "bk_small")} for model in models},
    }  # fmt: skip
    a_run(folder, "04_coco_evaluation", config, metrics)


def a_lesson(folder, subject, clip_i, **config):
    scores = {"teacher, before": {"clip_i": [0.1, 0.01]}, "teacher, lora": {"clip_i": [clip_i, 0.01]}}
    metrics = {"subject": subject, "steps": 8, "costs": {"teacher, lora": {}}, "scores": scores}
    a_run(folder, "05_dreambooth", {"subject": subject} | config, metrics)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    kd, scored, taught = (folder / name for name in ("03_kd_training", "04_coco_evaluation", "05_dreambooth"))
    a_training(kd / "a", 0.1)
    a_training(kd / "b", 0.5)  # the same once more: the newer one counts
    a_training(kd / "c", 0.7, seed=1)
    a_training(kd / "d", 0.9, batch_size=8)
    an_evaluation(scored / "e", "storybook", 128, kd / "c")
    an_evaluation(scored / "f", "clean", 40, kd / "nowhere")
    an_evaluation(scored / "h", "storybook", 128, kd / "c", guidance_scale=4)
    a_run(
        scored / "i", "04_coco_evaluation", {}, {"scores": {"teacher": {}}, "students": ["bk_small"]}
    )  # of an old version
    a_lesson(taught / "g", "dog2", 0.3)
    a_lesson(taught / "h", "cat2", 0.5)
    a_lesson(taught / "i", "dog2", 0.9, lora_rank=4)
    a_lesson(taught / "j", "dog2", 0.7, seed=1)
    return folder


@pytest.fixture(scope="module")
def results(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    (folder / "page.md").write_text("above\n<!-- students -->\nold\n<!-- /students -->\nbelow\n")
    summarise(runs, folder, folder / "page.md")
    return folder


def summarise(runs, folder, page):
    parameters = {"runs_dir": str(runs), "output_dir": str(folder), "readme": str(page)}
    papermill.execute_notebook(str(find_notebook("07")), str(folder / "07.ipynb"), parameters, progress_bar=False,
                               kernel_name="python3")  # fmt: skip


def table(folder, name):
    return pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)


def test_students_are_averaged_over_nothing_but_seeds(results):
    students = table(results, "students").set_index("settings")
    assert students.loc["", "after"] == "0.600 (0.500 to 0.700)" and students.loc["", "seeds"] == "2"
    assert students.loc["batch_size 8", "after"] == "0.900" and len(students) == 2


def test_scores_stand_beside_their_protocol_pictures_and_training(results):
    scores = table(results, "scores")
    assert list(scores["pictures"]) == ["128", "127", "128", "40", "39", "40", "128", "127", "128"]
    assert list(scores["minutes"]) == ["", "1.0", "", "", "", "", "", "1.0", ""]  # of the very student that was scored
    assert list(scores["settings"]) == [""] * 6 + ["guidance_scale 4"] * 3
    drawn = {path.name for path in results.glob("tradeoff*.png")}
    assert drawn == {"tradeoff_0_storybook-clean.png", "tradeoff_1_storybook-storybook.png",
                     "tradeoff_2_storybook-storybook.png"}  # fmt: skip


def test_subjects_are_averaged_over_equal_lessons(results):
    subjects = table(results, "subjects").set_index("settings")
    assert list(subjects.loc["", "subject"]) == ["dog2", "cat2", "dog2, seed 1", "mean"]
    assert list(subjects.loc["lora_rank 4", "subject"]) == ["dog2", "mean"]
    assert subjects.loc["", "clip_i"].iloc[-1].startswith("0.50") and len(subjects) == 6


def test_every_table_is_exported_in_three_formats(results):
    for name in ("results", "students", "scores", "subjects", "published"):
        assert len(table(results, name)) and (results / f"{name}.md").exists() and (results / f"{name}.tex").exists()
    assert "a\\|b" in (results / "results.md").read_text() and "bk\\_small" in (results / "students.tex").read_text()
    assert (results / "published_sd-v1.4.png").exists()


def test_the_readmes_table_is_written_anew_but_never_emptied(results, tmp_path):
    page = (results / "page.md").read_text()
    assert page.startswith("above\n<!-- students -->\n| preset |") and page.endswith("<!-- /students -->\nbelow\n")
    assert "0.900" in page and "old" not in page
    with pytest.raises(papermill.PapermillExecutionError, match="there are students for the table"):
        summarise(tmp_path / "nothing", tmp_path, results / "page.md")
    assert (results / "page.md").read_text() == page
