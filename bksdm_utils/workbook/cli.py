"""The one command: `python -m bksdm_utils`, or `bksdm` once installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click
import yaml

from ..config.base import Config
from ..config.deploy import Demo
from ..config.evaluation import SampleFolder
from ..config.training import KDTraining
from ..files import ROOT, is_main_process, write_json
from .headless import plan_jobs, run_jobs
from .parameters import find_notebook, parameters_help
from .protection import check_folder
from .run import choose_device, fill

parameter_option = click.option("-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE",
                                help="Set a parameter; repeatable.")  # fmt: skip
file_option = click.option("-f", "--file", "files", type=click.Path(exists=True, dir_okay=False), multiple=True,
                           help="YAML file of parameters; repeatable.")  # fmt: skip


class Commands(click.Group):
    """Errors of the input, and of files and networks, are one line; everything else keeps its traceback.

    Letters that the output's encoding lacks, as that of a file on Windows, become question marks.
    """

    def main(self, *args, **kwargs) -> object:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    """The BK-SDM workbook: cut, copy, distil, score, personalise and ship a Stable Diffusion U-Net."""


@main.command(add_help_option=False)
@click.argument("notebooks", nargs=-1)
@parameter_option
@file_option
@click.option("--sweep", multiple=True, metavar="NAME=A,B", help="Run every value of a parameter; repeatable.")
@click.option("-h", "--help", "show_help", is_flag=True, help="Show this, or a notebook's parameters, and exit.")
@click.pass_context
def run(ctx: click.Context, notebooks: tuple[str, ...], pairs, files, sweep, show_help: bool) -> None:
    """Run notebooks headlessly: "all", or numbers, names or paths.

    `run 03 --help` shows the parameters of notebook 03. With -p, a comma sweeps a parameter whose values can hold
    none (numbers, switches, words, variant, preset); --sweep sweeps any.
    """
    if show_help or not notebooks:
        click.echo(ctx.get_help())
        for path, kind in (find_notebook(name) for name in notebooks if name != "all"):
            click.echo(f"\nParameters of {path.stem}:\n{parameters_help(kind)}")
        ctx.exit()
    swept = {}
    for text in sweep:
        name, equals, values = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r}: expected NAME=A,B", param_hint="--sweep")
        swept[name.strip()] = [value.strip() for value in values.split(",")]
    failed = run_jobs(plan_jobs(notebooks, _values(pairs, files), swept))
    ctx.exit(1 if failed else 0)


def _values(pairs, files) -> dict[str, object]:
    """The parameters of YAML files and of -p, the latter last."""
    values: dict[str, object] = {}
    for file in files:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        if not isinstance(content, Mapping):
            raise ValueError(f"{file} holds {type(content).__name__}: expected lines of name: value")
        values |= content
    return values | dict(pairs)


def _help(text: str, kind: type[Config]) -> str:
    return f"{text}\n\n\b\nParameters:\n{parameters_help(kind)}"


def _add_job(name: str, kind: type[Config], config_of: str, text: str) -> None:
    """Adds a command that does a job in FOLDER; config.json is written there where it is not given."""

    @main.command(name, help=_help(text, kind))
    @click.argument("folder", type=click.Path(path_type=Path), required=False)
    @click.option("--config", type=click.Path(exists=True, path_type=Path), help=f"config.json of {config_of}.")
    @parameter_option
    @file_option
    def command(folder: Path | None, config: Path | None, pairs, files) -> None:
        from .jobs import run_job

        if (folder is None) == (config is None):
            raise click.UsageError("expected either FOLDER or --config FOLDER/config.json")
        values = _values(pairs, files)
        folder = folder or config.parent
        if config is None:
            settings = fill(kind, values)
        else:
            settings = kind(**{**json.loads(config.read_text(encoding="utf-8")), **values})
        if is_main_process():  # the others may see what it has written already
            check_folder(settings, folder)
        if config is None or values:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", settings.model_dump(mode="json"))
        run_job(settings.but(device=choose_device(settings.device)), folder)


_add_job("train", KDTraining, "a run's folder", "Distil a student in FOLDER, or as a run's config.json says; "
         "`accelerate launch -m bksdm_utils train …` works.")  # fmt: skip
_add_job(
    "sample", SampleFolder, "a folder of images", "Sample images of prompts into FOLDER; what exists there is kept."
)


@main.command(help=_help("Say how much GPU memory notebook 03 or 05 needs and how long it trains; no GPU, no weights: "
                         "bksdm memory -p preset sd-v1.4 -p variant bk_tiny, or bksdm memory 05 -p preset sd-v1.4. "
                         "Notebook 05's parameters: bksdm run 05 --help.", KDTraining))  # fmt: skip
@click.argument("notebook", type=click.Choice(["03", "05"]), default="03")
@parameter_option
@file_option
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), default=200.0, show_default=True,
              help="What the GPU computes, in 10^12 operations a second.")  # fmt: skip
def memory(notebook: str, pairs, files, tflops: float) -> None:
    """Prints the planner's report; `help` above is what users read."""
    if notebook == "03":
        from ..costs.planner import report
    else:
        from ..dreambooth.planning import report

    click.echo(report(fill(find_notebook(notebook)[1], _values(pairs, files)), tflops))


@main.command()
@click.argument("names", nargs=-1)
@click.pass_context
def download(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Fetch data sets, statistics and metric networks by name; without a name, list them."""
    from ..data.downloads import DOWNLOADS, GROUPS
    from ..data.downloads import download as fetch_all

    if not names:
        for name, item in DOWNLOADS.items():
            click.echo(f"{name:<28} {item.path}")
        for name, parts in GROUPS.items():
            click.echo(f"{name:<28} {', '.join(parts)}")
    ctx.exit(fetch_all(names))


@main.command(help=_help("Serve a page where teacher and students generate side by side.", Demo))
@parameter_option
@file_option
def demo(pairs, files) -> None:
    """Serves the page; `help` above is what users read."""
    from ..deploy.demo import serve

    settings = Demo(**_values(pairs, files))
    serve(settings.but(device=choose_device(settings.device)))


@main.command()
def subjects() -> None:
    """List google/dreambooth's subjects: bksdm run 05 -p preset sd-v1.4 --sweep subject=$(bksdm subjects)."""
    from ..dreambooth.subjects import dreambooth_subjects

    click.echo(",".join(dreambooth_subjects()))


@main.command()
@click.argument("stages", nargs=-1)
@click.option("--output-dir", type=click.Path(path_type=Path), default="outputs/00_storybook_world/teacher")
@click.option("--destination", type=click.Path(path_type=Path), default="data/storybook", help="Where export writes.")
@click.option("--max-train-steps", type=int, help="Of each stage, to try it out.")
@click.option("--device", default="auto", help="auto, cuda, mps or cpu.")
@click.option("--start", type=click.Path(path_type=Path), help="A pipeline whose U-Net is trained on.")
def storybook(
    stages: tuple[str, ...], output_dir: Path, destination: Path, max_train_steps: int | None, device: str,
    start: Path | None,
):  # fmt: skip
    """Make the embedded teacher, stage by stage; each resumes where it was stopped. Without a stage, list them."""
    from ..storybook.making import make
    from ..storybook.recipes import RECIPE

    if not stages:
        click.echo(" ".join([*RECIPE.configs, "export"]))
        return
    recipe = replace(RECIPE, start=start)
    make(stages, output_dir, destination, max_train_steps, choose_device(device), recipe=recipe)


@main.command()
@click.argument("address", required=False)
@click.option("--branch", default="main", show_default=True, help="That the badges open.")
def stamp(address: str | None, branch: str) -> None:
    """Write the repository's ADDRESS into all notebooks, so that each opens alone in Colab; by default git's origin."""
    from .colab import stamp as stamp_notebooks

    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    address = address or subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not address:
        raise ValueError("no address: git has no origin here; name it: bksdm stamp https://github.com/<you>/<name>")
    for path in stamp_notebooks(address, branch):
        click.echo(f"{path.name}: {address}")
