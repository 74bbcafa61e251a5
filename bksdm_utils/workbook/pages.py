"""Executed notebooks as web pages that need no network, and the index of all of them."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import nbformat

from ..files import ROOT

FORMULA = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL
)
MONOSPACE = ".jp-RenderedMarkdown pre { font-family: monospace; }"  # which the template leaves proportional
QUESTION = re.compile(r"\*\*(.+?\?)\*\*")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>BK-SDM workbook: executed notebooks</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
article {{ display: flex; gap: 1.5rem; padding: 1rem 0; border-top: 1px solid #ddd; }}
article div {{ flex: 1; }} article img {{ width: 16rem; height: 10rem; object-fit: contain; object-position: top; }}
h2 {{ font-size: 1.1rem; margin: 0; }} p {{ margin: .3rem 0; }} .run {{ color: #666; font-size: .85rem; }}
</style></head><body><h1>BK-SDM workbook: executed notebooks</h1>
{entries}
</body></html>
"""


def with_mathml(markdown: str) -> str:
    """Markdown with its TeX formulas as MathML, which browsers show without a network; code stays as it is."""
    from latex2mathml.converter import convert

    def formula(match: re.Match) -> str:
        tex = match["block"] or match["inline"]
        if tex is None:
            return match[0]
        mathml = convert(tex.strip(), display="block" if match["block"] else "inline")
        return mathml.replace("|", "&#x7C;").replace("*", "&#x2A;").replace("_", "&#x5F;")

    return FORMULA.sub(formula, markdown)


def write_page(notebook: Path) -> Path:
    """Writes an executed notebook as .html beside it."""
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
    body, _ = HTMLExporter().from_notebook_node(content, {"metadata": {"name": notebook.stem}})
    page = notebook.with_suffix(".html")
    # The template's scripts are fetched, and not needed: formulas are MathML, widgets have a static figure beside them.
    body = body.replace("</head>", f"<style>{MONOSPACE}</style></head>", 1)
    page.write_text(re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL), encoding="utf-8")
    return page


def write_index(outputs: Path = ROOT / "outputs") -> Path:
    """Writes index.html: every executed notebook below `outputs` with its question, key figure and one image."""
    pages = sorted(path for path in outputs.glob("*/*/*.html") if path.stem == path.parent.parent.name)
    index = outputs / "index.html"
    index.write_text(PAGE.format(entries="\n".join(_entry(page, outputs) for page in pages)), encoding="utf-8")
    return index


def _entry(page: Path, outputs: Path) -> str:
    first = next(cell for cell in nbformat.read(page.with_suffix(".ipynb"), as_version=4).cells).source
    question, result = QUESTION.search(first), page.parent / "result.json"
    figure = "did not finish"
    if result.is_file():
        figure = json.loads(result.read_text(encoding="utf-8"))["metrics"]["key_figure"]
    images = sorted(page.parent.glob("*.png"), key=lambda path: path.stat().st_mtime)
    link = html.escape(os.path.relpath(page, outputs))
    image = f'<img src="{html.escape(os.path.relpath(images[-1], outputs))}" alt="">' if images else ""
    title = html.escape(first.splitlines()[0].removeprefix("# "))
    parts = [f'<h2><a href="{link}">{title}</a></h2>', f"<p>{html.escape(question[1]) if question else ''}</p>",
             f"<p>{html.escape(figure)}</p>", f'<p class="run">{html.escape(page.parent.name)}</p>']  # fmt: skip
    return f"<article><div>{''.join(parts)}</div>{image}</article>"
