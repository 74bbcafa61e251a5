"""What is printed where the output cannot hold every letter."""

import os
import subprocess
import sys

import pytest

from bksdm_utils.files import ROOT


@pytest.mark.parametrize(
    "encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.slow), pytest.param("utf-8", marks=pytest.mark.slow)]
)
def test_output_in_another_encoding_does_not_end_a_command(tmp_path, encoding):
    plan = tmp_path / "✓ 东京.json"
    plan.write_text("no plan")
    command = [sys.executable, "-m", "bksdm_utils", "memory", "-p", "preset", "sd-v1.4", "-p", "variant", str(plan)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    said = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == 1 and "not a removal plan" in said and "Traceback" not in said


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.slow)])
def test_a_check_is_said_in_any_encoding(encoding):
    code = """from bksdm_utils.workbook.cli import main
from bksdm_utils.workbook.run import check
try:
    main(["--help"])
except SystemExit:
    check(True, "naïve 东京")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": encoding},
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0 and b"? na" in done.stdout
