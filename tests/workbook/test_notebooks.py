"""Every notebook, found by glob: its skeleton, its size, and what must not be in it."""

import re
from statistics import median

import nbformat
import pytest

from bksdm_utils.workbook.parameters import NOTEBOOKS

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert [path.stem[:2] for path in PATHS] == [f"{number:02}" for number in range(8)]


def test_it_is_valid_and_small(path, notebook):
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    assert "widgets" not in notebook.metadata


def test_the_first_cell_asks_the_question(notebook, path):
    first = notebook.cells[0].source
    assert first.startswith(f"# {path.stem[:2]} · ") and re.search(r"\*\*.+\?\*\*", first)
    for part in ("| needs | writes | time and memory |", "Paper:", "Previous:", "In Colab:"):
        assert part in first


def test_parameters_are_flat_literals_with_a_comment(notebook):
    (cell,) = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    for line in cell.source.splitlines():
        assert re.fullmatch(r"(\w+ = [^#]+  )?# [^=]+", line), line


def test_it_starts_checks_finishes_and_says_what_it_does_not_show(notebook):
    source = "\n".join(cell.source for cell in notebook.cells)
    for part in (
        "run = start(",
        "check(",
        "run.finish(",
        "*How to read it.*",
        "**Try it.**",
        "**What this does not show.**",
    ):
        assert part in source, part
    last = notebook.cells[-1].source
    assert "**Try it.**" in last


def test_cells_are_short_and_hold_no_class(notebook):
    cells = [cell for cell in code(notebook) if "parameters" not in cell.metadata.get("tags", ())]
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in cells]
    assert median(lengths) <= 8 and sum(length <= 20 for length in lengths) >= 0.9 * len(lengths), sorted(lengths)
    assert not any(line.startswith("class ") for cell in cells for line in cell.source.splitlines())


def test_it_holds_no_path_or_token_and_no_error(path, notebook):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.~])/(?:root|home|Users|tmp)/\w|hf_[A-Za-z0-9]{20}", text)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)


def test_execution_counts_are_absent_or_in_order(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))


def test_no_function_is_defined_in_two_places(path, notebook):
    own = set(re.findall(r"^def (\w+)", "\n".join(cell.source for cell in code(notebook)), re.M))
    for other in PATHS:
        if other != path:
            others = "\n".join(cell.source for cell in code(nbformat.read(other, as_version=4)))
            assert not own & set(re.findall(r"^def (\w+)", others, re.M)), other
