"""The command `run`: jobs, sweeps and folders; pages and their index."""

import json

import nbformat
import pytest
from click.testing import CliRunner

from bksdm_utils.workbook import headless, parameters
from bksdm_utils.workbook.cli import main
from bksdm_utils.workbook.headless import plan_jobs, run_jobs, with_mathml, write_index, write_page


def values(jobs, name):
    return [job.parameters[name] for job in jobs]


def test_one_job_may_name_its_folder_and_several_get_folders_below_it(tmp_path):
    (job,) = plan_jobs(["03"], {"seed": "1", "output_dir": str(tmp_path)})
    assert job.dir == tmp_path
    jobs = plan_jobs(["03"], {"seed": "1,2", "output_dir": str(tmp_path)})
    assert [job.dir.name for job in jobs] == ["storybook-bk_small-seed_1", "storybook-bk_small-seed_2"]


def test_commas_sweep_numbers_words_and_variants_but_no_texts_or_lists():
    assert values(plan_jobs(["03"], {"variant": "bk_base,bk_tiny", "seed": "0,1"}), "variant") == [
        "bk_base", "bk_base", "bk_tiny", "bk_tiny"]  # fmt: skip
    assert values(plan_jobs(["06"], {"prompt": "a boat, red"}), "prompt") == ["a boat, red"]
    assert values(plan_jobs(["04"], {"guidances": "1,2"}), "guidances") == ["1,2"]
    assert values(plan_jobs(["03"], {"kd": "block,self_attention"}), "kd") == ["block", "self_attention"]


def test_any_parameter_can_be_swept_explicitly():
    jobs = plan_jobs(["05"], {}, {"subject": ["tabby", "koi", "tabby"]})
    assert values(jobs, "subject") == ["tabby", "koi"] and len({job.dir for job in jobs}) == 2


def test_no_two_runs_of_a_sweep_share_a_folder():
    jobs = plan_jobs(["05"], {}, {"subject": ["a b", "a_b", "a/b"]})
    assert len({job.dir for job in jobs}) == 3


def test_all_stands_for_the_notebooks_that_have_the_parameters():
    assert [job.notebook.stem[:2] for job in plan_jobs(["all"], {"lambda_sd": "0"})] == ["03"]
    assert len(plan_jobs(["all"], {})) == 8
    with pytest.raises(ValueError, match="no notebook has all of nonsense"):
        plan_jobs(["all"], {"nonsense": "1"})


@pytest.mark.parametrize(
    ("given", "fault"),
    [({"batch_sise": "1"}, "batch_size"), ({"batch_size": "none of these"}, "whole number"),
     ({"preset": "sd-v9"}, "sd-v1.4"), ({"variant": "bk_huge"}, "bk_huge"), ({"seed": "0,-1"}, "seed is")],
)  # fmt: skip
def test_a_fault_is_found_before_anything_runs(given, fault):
    with pytest.raises(ValueError, match=fault):
        plan_jobs(["03"], given)


@pytest.fixture
def tiny_notebook(tmp_path, monkeypatch):
    """A notebook in the place of 03 that finishes at once, or fails for seed 1."""
    source = (
        "import json, pathlib\nassert seed != '1'\n"
        "pathlib.Path(output_dir, 'result.json').write_text(json.dumps({'metrics': {'key_figure': f'seed {seed}'}}))"
    )
    cells = [nbformat.v4.new_markdown_cell("# 03 · A test\n\n**Does it run?** $z_t$"),
             nbformat.v4.new_code_cell("seed = 0\noutput_dir = None", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(source)]  # fmt: skip
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebooks / "03_kd_training.ipynb")
    monkeypatch.setattr(parameters, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(headless, "NOTEBOOKS", notebooks)
    return tmp_path


def test_a_sweep_continues_after_a_failure_and_says_so(tiny_notebook, capsys):
    out = tiny_notebook / "outputs"
    assert run_jobs(plan_jobs(["03"], {"seed": "0,1,2", "output_dir": str(out)})) == 1
    text = capsys.readouterr().out
    assert text.count("  ok ") == 2 and "FAILED" in text and "seed 2" in text
    folders = sorted((out / "03_kd_training").iterdir())
    assert all((folder / "03_kd_training.html").is_file() for folder in folders)  # also of the failed one
    index = write_index(out).read_text()
    assert index.count("<article>") == 3 and "Does it run?" in index and "did not finish" in index


def test_an_executed_page_needs_no_network_and_has_readable_formulas(tiny_notebook):
    (job,) = plan_jobs(["03"], {"output_dir": str(tiny_notebook / "run")})
    run_jobs([job])
    page = write_page(job.dir / "03_kd_training.ipynb").read_text()
    assert "<math" in page and "$z_t$" not in page
    assert "<script" not in page and 'src="http' not in page and 'href="http' not in page


def test_formulas_become_mathml_and_code_and_prices_stay():
    text = with_mathml(r"$\lVert a \rVert^2$ and `$code$` cost $5 and $6" + "\n\n$$x_1$$")
    assert text.count("<math") == 2 and "`$code$`" in text and "$5 and $6" in text


def test_help_shows_a_notebooks_parameters():
    text = CliRunner().invoke(main, ["run", "03", "--help"]).output
    assert "lambda_kd_feat" in text and "weight of the feature distillation" in text


@pytest.mark.parametrize("command", ["run", "train", "sample", "download", "demo", "subjects", "storybook"])
def test_every_command_has_help(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["run", "03", "-p", "batch_size", "x"], "batch_size"), (["run", "99"], "unknown notebook"), (["train"], "FOLDER"),
     (["sample", "x", "-p", "prompts", "none.csv"], "none.csv"), (["run", "03", "--sweep", "seed"], "NAME=A,B")],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_it(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0 and words in result.output and "Traceback" not in result.output


def test_parameters_come_from_yaml_files_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("bksdm_utils.workbook.cli.run_jobs", lambda jobs: seen.extend(jobs) or 0)
    (tmp_path / "p.yaml").write_text("seed: 3\nmixed_precision: no\ntrackers: [tensorboard]\n")
    arguments = ["run", "03", "-f", str(tmp_path / "p.yaml"), "-p", "seed", "4"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert seen[0].parameters == {"seed": "4", "mixed_precision": False, "trackers": ["tensorboard"]}
    assert json.dumps(seen[0].parameters)
