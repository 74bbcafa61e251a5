"""Tables over the result.json files of finished runs, and what their figures show (notebook 07)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..config.presets import PRESETS
from ..core.plans import student_config
from ..costs.counting import count
from ..dreambooth.study import mean_table
from ..evaluation.metrics import Score
from ..models.configs import model_config
from .parameters import find_notebook

RUN = {"notebook": "notebook", "preset": "preset", "variant": "variant", "folder": "folder",
       "provenance.seconds": "seconds", "metrics.key_figure": "key figure"}  # fmt: skip
STUDENT = {"preset": "preset", "variant": "variant", "metrics.steps": "steps", "config.seed": "seed",
           "settings": "settings", "folder": "folder", "metrics.params": "parameters",
           **{f"metrics.{name}.clip_score": name for name in ("teacher", "before", "after", "recovered")},
           **{f"metrics.after.{name}": name for name in ("distance", "object", "colour", "place", "relation")},
           "metrics.seconds_trained": "minutes"}  # fmt: skip
EQUAL = ["preset", "variant", "parameters", "steps", "settings"]  # in students that differ in nothing but their seed
COMPARABLE = ["preset", "protocol", "captions", "settings"]  # where equal, models may be compared
COSTS = ["parameters", "MACs", "latency"]
MODEL = [*COMPARABLE, "run", "model", "images", *COSTS, "minutes", "MB", "scores"]
LEARNER = ["preset", "learner", "steps", "settings"]
# These parameters do not change a result, or have a column of their own.
NO_SETTING = {"preset", "variant", "subject", "class_word", "live", "seed", "protocol", "students", "models", "methods",
              "untrained", "guidances", "num_guidance_images", "device", "num_processes", "output_dir", "cache_dir",
              "images_dir", "dataset_dir", "resume", "checkpoint", "checkpoint_steps", "checkpoints_kept",
              "keep_models", "trackers", "validation_steps", "validation_prompts", "num_validation_images", "ablation",
              "ablation_steps", "ablation_seeds", "drift_steps", "find_batch_size", "ema_device",
              "gradient_checkpointing", "channels_last", "compiled", "tf32", "low_precision_norms"}  # fmt: skip
FORMATS = {"parameters": "{:,.0f}", "MACs": "{:.4g}", "latency": "{:.3g}",
           **dict.fromkeys(("teacher", "before", "after"), "{:.3f}"),
           "recovered": "{:.0%}", "distance": "{:.1f}",
           **dict.fromkeys(("object", "colour", "place", "relation"), "{:.0%}"),
           "MB": "{:.1f}", "GMACs": "{:.3f}", "minutes": "{:.1f}"}  # fmt: skip
Groups = dict[str, dict[str, dict[str, float]]]  # as `tradeoff` takes them


def collect(runs_dir: Path) -> tuple[list[dict], list[tuple[str, str]]]:
    """Every result.json below a folder, oldest first, each with its `folder` and `settings`; and (path, reason) of what
    is set aside: files that cannot be read, and results of older versions of a notebook."""
    results, set_aside = [], []
    for path in sorted(runs_dir.glob("*/*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            folder = f"{path.parent.parent.name}/{path.parent.name}"
            results.append(result | {"folder": folder, "settings": changed(result)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            set_aside.append((str(path), f"not a result of this version: {error}".splitlines()[0]))
    return sorted(results, key=lambda result: result["provenance"]["started"]), set_aside


def changed(result: Mapping) -> str:
    """The settings of a run that differ from the defaults of its notebook and preset: "batch_size 8, lora_rank 4".

    Raises:
        ValueError: the notebook has other parameters now.
    """
    kind = find_notebook(result["notebook"])[1]
    kind(**result["config"])
    defaults = kind.filled(preset=result["preset"]) if "preset" in kind.model_fields else kind()
    different = {n: v for n, v in result["config"].items() if v != defaults.model_dump(mode="json")[n]}
    free = NO_SETTING ^ {"seed", "batch_size", "num_images"} if "evaluation" in result["notebook"] else NO_SETTING
    return ", ".join(f"{name} {value}" for name, value in different.items() if name not in free)


def table(results: Sequence[Mapping], columns: Mapping[str, str] = RUN) -> pd.DataFrame:
    """One row for each run; `columns` has paths into a result, such as "metrics.steps", and their titles."""
    rows = pd.json_normalize(results, max_level=2).reindex(columns=list(columns)).rename(columns=columns)
    return rows.fillna({"variant": ""})


def students_table(results: Sequence[Mapping], runs_dir: Path) -> pd.DataFrame:
    """One row for each student of notebook 03: its scores before and after training, and its costs."""
    students = table([r for r in results if r["notebook"] == "03_kd_training"], STUDENT)
    students["minutes"] /= 60
    for row, folder in students["folder"].items():
        config = runs_dir / folder / "unet_ema" / "config.json"
        if config.is_file():
            students.loc[row, "MB"] = sum(file.stat().st_size for file in config.parent.glob("*.safetensors")) / 1e6
            students.loc[row, "GMACs"] = count(json.loads(config.read_text())).macs / 1e9
    return students


def over_seeds(students: pd.DataFrame) -> pd.DataFrame:
    """Mean, lowest and highest score over the seeds of equal students; of two equal runs the newer one counts."""

    def summary(values: pd.Series) -> str:
        low, mean, high = (FORMATS[values.name].format(v) for v in (values.min(), values.mean(), values.max()))
        return mean if low == high else f"{mean} ({low} to {high})"

    rows = []
    newest = students.dropna(subset=["after"]).drop_duplicates([*EQUAL, "seed"], keep="last")
    for key, group in newest.groupby(EQUAL):
        known = group[[name for name in FORMATS if name in group and name not in EQUAL]].dropna(axis=1, how="all")
        rows.append(dict(zip(EQUAL, key, strict=True)) | {"seeds": len(group)} | known.apply(summary).to_dict())
    averaged = pd.DataFrame(rows, columns=None if rows else [*EQUAL, "seeds"])
    averaged["parameters"] = averaged["parameters"].map(FORMATS["parameters"].format)
    return averaged if averaged["settings"].any() else averaged.drop(columns="settings")


def models_table(results: Sequence[Mapping], students: pd.DataFrame, runs_dir: Path) -> pd.DataFrame:
    """One row for each model that notebook 04 evaluated, with its scores as {name: (value, error)}."""
    trained = {(runs_dir / row["folder"]).resolve(): row for row in students.to_dict("records")}
    rows = []
    for r in (r for r in results if r["notebook"] == "04_coco_evaluation"):
        m, run = r["metrics"], r["folder"].split("/")[-1]
        for name, scores in m["scores"].items():
            student = trained.get(Path(m["students"].get(name, "")).parent.resolve(), {})
            costs = zip(COSTS, (m["unets"][name].get(cost) for cost in ("params", "macs", "latency")), strict=True)
            known = {score: pair for score, pair in scores.items() if None not in pair}
            rows.append({"preset": r["preset"], "run": run, "model": name, "protocol": m["protocol"], **dict(costs),
                         "settings": r["settings"], "captions": m["num_images"], "images": m["images"][name]["scored"],
                         "minutes": student.get("minutes"), "MB": student.get("MB"), "scores": known})  # fmt: skip
    return pd.DataFrame(rows, columns=MODEL)


def scores_table(models: pd.DataFrame) -> pd.DataFrame:
    """The same, readable: scores with their errors, costs rounded."""
    shown = models.drop(columns="scores")
    for name in shown.columns.intersection(list(FORMATS)):
        shown[name] = shown[name].map(FORMATS[name].format, na_action="ignore")
    scores = [{name: str(Score(*pair)) for name, pair in row.items()} for row in models["scores"]]
    return shown.join(pd.DataFrame(scores, index=models.index)).fillna("").rename(columns={"latency": "latency (s)"})


def comparisons(models: pd.DataFrame) -> Iterator[tuple[str, str, Groups]]:
    """File name, title and points of a figure for each set of models that may be compared."""
    teachers = models[models["model"] == "teacher"].set_index("run")
    chosen = models[~models["model"].isin(["copied", "random"]) & models["scores"].map(lambda s: "clip_score" in s)]
    for number, (key, rows) in enumerate(chosen.groupby(COMPARABLE)):
        groups, several = {"teacher": {}, "student": {}}, rows["model"].duplicated(keep=False)
        for row, again in zip(rows.to_dict("records"), several, strict=True):
            group = "teacher" if row["model"] == "teacher" else "student"
            if row["run"] not in teachers.index:  # scored without its teacher: no point of a figure
                continue
            shares = {cost: row[cost] / teachers.loc[row["run"], cost] for cost in COSTS}
            name = f"{row['model']} ({row['run']})" if again else row["model"]
            groups[group][name] = {"CLIP score": row["scores"]["clip_score"][0], **shares}
        if all(groups.values()):
            title = "{}, protocol {}, {:,} images of each model {}".format(*key).strip()
            yield f"tradeoff_{number}_{key[0]}-{key[1]}", title, groups


def subjects_table(results: Sequence[Mapping]) -> pd.DataFrame:
    """Scores of every subject and seed by model, method and settings, with their means; the newest of equal runs."""
    learned = {}
    for r in (r for r in results if r["notebook"] == "05_dreambooth"):
        m, seed = r["metrics"], r["config"]["seed"]
        name = f"{m['subject']}, seed {seed}" if seed else m["subject"]
        for learner in m["costs"] if m["scores"] else ():
            untrained = m["scores"][f"{learner.split(',')[0]}, before"]
            before = {f"{score} before": pair for score, pair in untrained.items()}
            runs = learned.setdefault((r["preset"], learner, m["steps"], r["settings"]), {})
            runs[r["config"]["subject"], seed] = {"subject": name, **before, **m["scores"][learner]}
    tables = [mean_table(list(runs.values())).assign(**dict(zip(LEARNER, key, strict=True)))
              for key, runs in sorted(learned.items())]  # fmt: skip
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*LEARNER, "subject"])
    return rows[[*LEARNER, *(name for name in rows if name not in LEARNER)]].fillna("")


def published(scores: pd.DataFrame) -> Iterator[tuple[str, Groups]]:
    """Teacher and points of a figure for each teacher of the BK-SDM paper."""
    for preset, rows in scores[scores["source"] == "arXiv 2305.15798"].groupby("teacher"):
        config = model_config(PRESETS[preset].configs)
        whole, groups = count(config), {"teacher": {}}
        for row in rows.fillna({"variant": "teacher"}).itertuples():
            own = whole if row.variant == "teacher" else count(student_config(config, row.variant))
            shares = {"parameters": own.params / whole.params, "MACs": own.macs / whole.macs}
            group = "teacher" if own is whole else f"{row.pairs} pairs"
            groups.setdefault(group, {})[row.variant] = {"CLIP score": row.clip_score, **shares}
        yield preset, groups


def export(rows: pd.DataFrame, path: Path) -> str:
    """Writes a table as .csv, .md and .tex; returns the Markdown."""
    lines = [rows.columns, ["---"] * len(rows.columns), *rows.fillna("").itertuples(index=False)]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in cells)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    rows.to_csv(path.with_suffix(".csv"), index=False)
    styled = rows.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    styled.to_latex(path.with_suffix(".tex"), hrules=True)
    return markdown


def rewrite(page: Path, mark: str, markdown: str) -> int:
    """Puts a table between <!-- mark --> and <!-- /mark --> of a Markdown file; returns how often it has them."""
    text = page.read_text(encoding="utf-8")
    new, places = re.subn(f"(?<=<!-- {mark} -->\n).*?(?=<!-- /{mark} -->)", lambda _: markdown, text, flags=re.S)
    page.write_text(new, encoding="utf-8")
    return places
