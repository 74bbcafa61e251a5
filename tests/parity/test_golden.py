"""Numbers that no restructuring may change: losses, images and scores of small runs of 03 to 06, recorded once.

On a kind of CPU they were recorded on they must be equal bit for bit; other CPUs round otherwise, so there they must
agree roughly with one of the recordings. To record anew, when a change of numbers is meant:
python tests/parity/test_golden.py
"""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"num_images": 8}
RUNS = {
    "03": SMALL | {"max_train_steps": 20, "ablation_steps": 3, "num_validation_images": 8, "validation_steps": 10},
    "04": {"num_images": 24, "num_guidance_images": 20, "guidances": "2", "num_inference_steps": 6},
    "05": {"max_train_steps": 6, "num_class_images": 8, "num_images": 1, "num_inference_steps": 6, "drift_steps": 0,
           "subject": "tabby", "full_learning_rate": 5e-4, "lora_learning_rate": 1.5e-3},
    "06": SMALL | {"lcm_steps": 6, "few_steps": "4", "formats": "diffusers", "num_inference_steps": 8},
}  # fmt: skip
EXACT = ("loss", "loss_task", "loss_output", "loss_feature", "gradient_norm")


def cpu() -> str:
    """The kind of CPU, which decides how sums are rounded; virtual ones share a name, so their numbers belong to it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    names = ("model name", "cpu family", "model", "stepping")
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts) or "unknown"


def measure(folder: Path) -> dict:
    """Runs the notebooks, one thread each, and returns their numbers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    student = ["-p", "student", str(folder / "03" / "unet_ema")]
    for number, parameters in RUNS.items():
        given = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
        images = ["-p", "images_dir", str(folder / "images")]
        students = ["-p", "students", student[2], *images]
        also = {"03": [], "04": students, "05": [*student, *images], "06": student}[number]
        command = [sys.executable, "-m", "bksdm_utils", "run", number, *given, *also, "-p", "output_dir",
                   str(folder / number)]  # fmt: skip
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    metrics = {n: json.loads((folder / n / "result.json").read_text())["metrics"] for n in RUNS}
    log = list(csv.DictReader((folder / "03" / "log.csv").open()))
    images = sorted((folder / "images").rglob("images/*.png"))
    return {
        "losses": [{name: float(row[name]) for name in EXACT} for row in log],
        "validation": list(csv.DictReader((folder / "03" / "validation.csv").open())),
        "images": sorted(hashlib.sha256(p.read_bytes()).hexdigest()[:16]
                         for p in images if p.stem in ("test-0", "test-7", "00-0", "class-3")),
        "scores 03": {k: v for k, v in metrics["03"].items() if k in ("scores", "ablation", "loss_last")},
        "scores 04": metrics["04"]["scores"],
        "scores 05": metrics["05"]["scores"],
        "few steps 06": metrics["06"]["few_steps"],
    }  # fmt: skip


def differences(found, golden, path="") -> list[str]:
    """Every place where the two differ by more than what rounding grows to in 20 steps: a tenth, in gradient norms."""
    if isinstance(golden, dict) and isinstance(found, dict):
        keys = sorted({*golden, *found})
        return [d for key in keys for d in differences(found.get(key), golden.get(key), f"{path}/{key}")]
    if isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        return [d for i, pair in enumerate(zip(found, golden, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if path.startswith("/validation") and isinstance(golden, str) and isinstance(found, str):  # of a CSV file
        return differences(float(found), float(golden), path)
    if isinstance(golden, float) and isinstance(found, (int, float)):
        return [] if abs(found - golden) <= 1e-2 + 1e-1 * abs(golden) else [f"{path}: {found}, was {golden}"]
    return [] if found == golden or path.startswith("/images") else [f"{path}: {found}, was {golden}"]


@pytest.mark.slow
def test_numbers_are_what_they_were(tmp_path):
    recorded, found = json.loads(GOLDEN.read_text()), json.loads(json.dumps(measure(tmp_path)))
    own = [golden["numbers"] for golden in recorded if golden["cpu"] == cpu()]
    images = found.pop("images")
    for numbers in own:
        assert set(numbers.pop("images")) <= set(images)  # later versions may keep more of them
        assert found == numbers
    if not own:
        all_differences = [differences(found, {**golden["numbers"], "images": None}) for golden in recorded]
        assert [] in all_differences, all_differences


if __name__ == "__main__":
    others = [golden for golden in json.loads(GOLDEN.read_text()) if golden["cpu"] != cpu()]
    with tempfile.TemporaryDirectory() as folder:
        recordings = [*others, {"cpu": cpu(), "numbers": measure(Path(folder))}]
    GOLDEN.write_text(json.dumps(recordings, indent=1) + "\n")
