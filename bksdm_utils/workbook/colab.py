"""Notebooks that open alone: a first code cell that fetches the workbook, and the badge that opens them in Colab."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat

from ..files import ROOT
from .parameters import NOTEBOOKS

TAG = "colab"
CELL = """# In Colab this fetches the workbook and installs it; where it is installed, nothing happens.
import importlib.util
import os
import subprocess
import sys

repository = "{address}"  # its address; `bksdm stamp ADDRESS` writes it into every notebook
drive = ""  # "MyDrive/bksdm" keeps outputs, caches and checkpoints on Google Drive; resume = True goes on from there
if importlib.util.find_spec("bksdm_utils") is None:
    assert repository, "bksdm_utils is not installed in this kernel: choose another one, or set repository"
    root = os.path.join("/content" if os.path.isdir("/content") else os.path.expanduser("~"), "bksdm")
    if not os.path.isdir(root):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", repository, root], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", root], check=True)
    sys.path.insert(0, root)  # a running kernel does not see what pip installs in this way
    os.chdir(os.path.join(root, "notebooks"))
    if drive:
        from bksdm_utils.workbook.colab import keep_on_drive

        keep_on_drive(drive)"""
LINE = re.compile(r"^In Colab:.*$", re.MULTILINE)
BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/{name}/blob/{branch}/notebooks/{file})")  # fmt: skip
ADDRESS = re.compile(r"""((https?|file|ssh)://|git@)[^\s"'\\]+""")
GITHUB = re.compile(r"(?:https://|git@)github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?")


def stamp(address: str, branch: str = "main", notebooks: Path = NOTEBOOKS) -> list[Path]:
    """Writes a repository's address into the first code cell of every notebook, and on GitHub a badge above it.

    Args:
        address: as `git clone` takes it; empty takes both out again.
        branch: that the badge opens.

    Raises:
        ValueError: this is no address; nothing is written.
    """
    if address and not ADDRESS.fullmatch(address):
        raise ValueError(f"address is {address!r}: expected https://github.com/<you>/<repository>, or another that git "
                         "clone takes")  # fmt: skip
    if named := GITHUB.fullmatch(address):
        address = f"https://github.com/{named[1]}"  # which needs no key
    paths = sorted(notebooks.glob("*.ipynb"))
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        first, cell = notebook.cells[:2]
        if TAG not in cell.metadata.get("tags", ()):
            cell = nbformat.v4.new_code_cell(id=TAG, metadata={"tags": [TAG]})
            notebook.cells.insert(1, cell)
        cell.source = CELL.replace("{address}", address)
        badge = BADGE.format(name=named[1], branch=branch, file=path.name) + " " if named else ""
        first.source = LINE.sub(f"In Colab: {badge}the next cell fetches and installs this workbook.", first.source)
        nbformat.write(notebook, path)
    return paths


def keep_on_drive(folder: str, root: Path = ROOT) -> Path:
    """Mounts Google Drive and puts outputs, caches and checkpoints there, for Colab's disk vanishes (not yet run)."""
    from google.colab import drive

    drive.mount("/content/drive")
    kept, outputs = Path("/content/drive", folder), root / "outputs"
    kept.mkdir(parents=True, exist_ok=True)
    if not outputs.is_symlink():
        shutil.copytree(outputs, kept, dirs_exist_ok=True)
        shutil.rmtree(outputs)
        outputs.symlink_to(kept, target_is_directory=True)
    return kept
