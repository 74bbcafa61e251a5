"""README and docs: their code runs, their links lead somewhere, their size stays small."""

import re

import pytest

from bksdm_utils.config.base import Config
from bksdm_utils.files import ROOT
from bksdm_utils.workbook.parameters import CLASSES

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "data" / "README.md",
    ROOT / "outputs" / "README.md",
]
COMMAND = re.compile(r"(?:bksdm|python -m bksdm_utils) run (\d\d)((?: -p \w+ \S+)*)")


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request):
    return request.param


def test_the_readmes_twenty_lines_run_and_give_losses(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    variables = {}
    exec(code, variables)
    losses = variables["losses"]
    assert losses.total.isfinite() and len(losses.feature) == len(variables["taps"]) == 6
    statements = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(statements) <= 20


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10_240


def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_commands_name_parameters_that_exist(page):
    for number, options in COMMAND.findall(page.read_text(encoding="utf-8")):
        kind: type[Config] = CLASSES[number]
        for name in re.findall(r"-p (\w+)", options):
            assert name in kind.model_fields, (number, name)


def test_no_page_has_a_gap_or_a_path_of_one_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\b(?:TODO|FIXME|TBD|STUDENTS)\b", text)
    assert not re.search(r"(?<![\w.~/])/(?:root|home|tmp)/\w", text)
