"""The first code cell of the notebooks, in a kernel that has torch and the other packages, but not this one."""

import json
import subprocess
import sys
import sysconfig

import nbformat
import pytest
from nbclient import NotebookClient

from bksdm_utils.files import ROOT
from bksdm_utils.workbook.colab import CELL


@pytest.mark.nightly
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_the_cell_for_colab_works_in_any_kernel_and_twice(tmp_path, monkeypatch, used):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read
    kernel = tmp_path / "kernels" / "colab"
    kernel.mkdir(parents=True)
    command = [str(tmp_path / "env" / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "colab", "language": "python"}))
    cell = CELL.replace("{address}", f"file://{ROOT}")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [
        "import torch, diffusers" if used else "",
        "import importlib.util, torch\nassert importlib.util.find_spec('bksdm_utils') is None\ntorch.__file__",
        cell, cell,
        "import os, bksdm_utils, torch\nfrom bksdm_utils.config.training import KDTraining\n"
        "print(bksdm_utils.__file__, os.getcwd(), torch.__file__)",
    ]  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(
        notebook, kernel_name="colab", timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    found = notebook.cells[-1].outputs[0].text.split()
    assert found[0] == f"{tmp_path}/bksdm/bksdm_utils/__init__.py" and found[1] == f"{tmp_path}/bksdm/notebooks"
    assert found[2] == notebook.cells[1].outputs[0]["data"]["text/plain"].strip("'")
