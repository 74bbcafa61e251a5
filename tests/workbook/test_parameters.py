"""The notebooks' parameters cells, and the names by which notebooks are found."""

import nbformat
import pytest

from bksdm_utils.workbook.parameters import (
    CLASSES,
    assigned_parameters,
    find_notebook,
    parameters_cell,
    parameters_help,
)

KINDS = list(CLASSES.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_parameters_cell_repeats_the_class(kind):
    path, _ = find_notebook(kind.notebook)
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    assert cell.source == parameters_cell(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_papermill_and_our_help_show_the_same_text(kind):
    import papermill

    seen = papermill.inspect_notebook(str(find_notebook(kind.notebook)[0]))
    assert list(seen) == list(kind.model_fields)
    text = parameters_help(kind)
    for name, field in kind.model_fields.items():
        assert seen[name]["help"] == field.description and name in text and field.description in text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_cells_literals_are_the_classes_defaults(kind):
    variables = {}
    exec(parameters_cell(kind), variables)
    given = {name: variables[name] for name in kind.model_fields}
    assert kind(**given) == kind()


@pytest.mark.parametrize("name", ["03", "03_kd_training", "03_kd_training.ipynb", "notebooks/03_kd_training.ipynb"])
def test_a_notebook_is_found_by_number_name_and_path(name):
    path, kind = find_notebook(name)
    assert path.name == "03_kd_training.ipynb" and kind.__name__ == "KDTraining"


@pytest.mark.parametrize("name", ["3", "09", "03_other", "all", ""])
def test_an_unknown_notebook_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="04_coco_evaluation"):
        find_notebook(name)


def test_only_cells_of_parameters_count_as_such():
    kind = CLASSES["03"]
    sources = ["seed = 1\nbatchsize = 4  # misspelt", "import os\nseed = 2\nother = 3", "scratch = 5", "x ="]
    assert assigned_parameters(sources, kind) == {"seed", "batchsize"}
