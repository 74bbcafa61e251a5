"""The core depends on torch and diffusers alone, and its plans on neither."""

import subprocess
import sys

import pytest

HIDDEN = (
    "accelerate",
    "datasets",
    "papermill",
    "transformers",
    "pandas",
    "matplotlib",
    "peft",
)  # peft needs two of them
BLOCK = f"""
import importlib.abc, importlib.metadata, importlib.util, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
find, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {HIDDEN} else find(name, package)

def hidden_version(name):
    if name in {HIDDEN}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = hidden_version
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_the_core_imports_without_the_other_libraries():
    modules = ", ".join(
        f"bksdm_utils.core.{name}" for name in ("plans", "copying", "surgery", "taps", "losses", "families")
    )
    ended = run(f"{BLOCK}\nimport {modules}\nprint([n for n in sys.modules if n.startswith('bksdm_utils')])")
    assert ended.returncode == 0, ended.stderr
    assert all(name.startswith("bksdm_utils.core") for name in eval(ended.stdout) if name != "bksdm_utils")


def test_plans_import_neither_torch_nor_diffusers():
    ended = run("import sys, bksdm_utils.core.plans; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert not {"torch", "diffusers", "numpy", "pydantic"} & set(ended.stdout.split()), ended.stderr
