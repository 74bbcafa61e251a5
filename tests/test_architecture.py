"""The rooms: imports go downwards, files and functions stay small, a wheel has every room."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bksdm_utils.files import ROOT

FILES = sorted((ROOT / "bksdm_utils").rglob("*.py"))


def test_imports_go_downwards_only():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_import_inside_a_function_reaches_another_room_but_for_the_command_line():
    late = []
    for path in FILES:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                late += [(path.name, node.lineno) for node in ast.walk(function)
                         if isinstance(node, ast.ImportFrom) and node.level]  # fmt: skip
    assert {name for name, _ in late} <= {"cli.py", "headless.py"}, late  # commands answer before torch is loaded


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


def test_every_module_says_what_it_is_for():
    assert not [path for path in FILES if path.read_text(encoding="utf-8").strip()
                and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]  # fmt: skip


@pytest.mark.slow
def test_a_wheel_has_every_room(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "bksdm_utils", source / "bksdm_utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "build", "--wheel", "--quiet", "--out-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], check=True)
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES
               if path.name not in ("__main__.py", "onnx_sample.py")]  # fmt: skip
    program = (
        f"import sys; sys.path.insert(0, {str(target)!r})\nimport importlib\n"
        f"for name in {modules!r}:\n    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(target)!r}), module.__file__\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
