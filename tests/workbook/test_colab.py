"""Notebooks that open alone: the first code cell and the badge."""

import shutil
import sys
from types import SimpleNamespace

import nbformat
import pytest

from bksdm_utils.workbook.colab import TAG, keep_on_drive, stamp
from bksdm_utils.workbook.parameters import NOTEBOOKS


@pytest.fixture
def notebooks(tmp_path):
    for path in NOTEBOOKS.glob("0[03]*.ipynb"):
        shutil.copy(path, tmp_path)
    return tmp_path


def read(folder):
    return [nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))]


def test_every_notebook_begins_with_the_cell_which_does_nothing_here():
    for notebook in read(NOTEBOOKS):
        cell = notebook.cells[1]
        assert cell.metadata.tags == [TAG] and 'repository = ""' in cell.source
        names = {}
        exec(cell.source, names)
        assert "root" not in names


@pytest.mark.parametrize(
    "address", ["https://github.com/me/fork", "https://github.com/me/fork.git", "git@github.com:me/fork.git"]
)
def test_an_address_is_written_once_with_a_badge(address, notebooks):
    for _ in range(2):
        stamp(address, "trunk", notebooks)
    for notebook in read(notebooks):
        assert sum(TAG in cell.metadata.get("tags", ()) for cell in notebook.cells) == 1
        assert 'repository = "https://github.com/me/fork"' in notebook.cells[1].source
        assert notebook.cells[0].source.count("/github/me/fork/blob/trunk/notebooks/0") == 1
    stamp("", notebooks=notebooks)
    assert read(notebooks)[0] == read(NOTEBOOKS)[0]


def test_other_hosts_get_no_badge(notebooks):
    stamp("https://gitlab.com/me/fork", notebooks=notebooks)
    assert all("colab-badge" not in n.cells[0].source and "gitlab" in n.cells[1].source for n in read(notebooks))


@pytest.mark.parametrize("address", ["me/fork", "somewhere", 'https://x"+evil+"'])
def test_what_is_no_address_is_refused(address, notebooks):
    before = read(notebooks)
    with pytest.raises(ValueError, match="expected https"):
        stamp(address, notebooks=notebooks)
    assert read(notebooks) == before


def test_without_the_package_and_an_address_the_cell_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="choose another one, or set repository"):
        exec(read(NOTEBOOKS)[0].cells[1].source, {})


def test_outputs_move_to_the_drive(tmp_path, monkeypatch):
    colab = SimpleNamespace(drive=SimpleNamespace(mount=lambda place: None))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "README.md").write_text("kept")
    monkeypatch.setattr("bksdm_utils.workbook.colab.Path", lambda *parts: tmp_path.joinpath("drive", parts[-1]))
    for _ in range(2):
        keep_on_drive("MyDrive/bksdm", tmp_path)
    assert (tmp_path / "drive/MyDrive/bksdm/README.md").read_text() == "kept" and (tmp_path / "outputs").is_symlink()
