"""config.json of every notebook equals what ran: what trainer, sampler and scorer were given, in its own process."""

import json
import os
import subprocess
import sys

import pytest
from diffusers import UNet2DConditionModel

from bksdm_utils.core.surgery import build_student
from bksdm_utils.files import ROOT
from bksdm_utils.workbook.parameters import CLASSES

RECORDER = """
import functools, json, os
if os.environ.get("BKSDM_RECORD"):
    def record(kind, config):
        with open(os.environ["BKSDM_RECORD"], "a") as file:
            file.write(json.dumps([kind, config.model_dump(mode="json")]) + "\\n")

    from bksdm_utils.evaluation import sampling
    original = sampling.sample_batches

    @functools.wraps(original)
    def sample_batches(pipeline, captions, seeds, settings):
        record("sampler", settings)
        yield from original(pipeline, captions, seeds, settings)

    sampling.sample_batches = sample_batches
    from bksdm_utils.evaluation.scorer import Scorer
    from bksdm_utils.training.trainer import Trainer
    for kind, cls in (("trainer", Trainer), ("scorer", Scorer)):
        def init(self, *args, _init=cls.__init__, _kind=kind, **kwargs):
            record(_kind, next(value for value in args if hasattr(value, "model_dump")))
            _init(self, *args, **kwargs)
        cls.__init__ = init
"""
SMALL = {
    "00": {"num_images": 3, "num_inference_steps": 5, "seed": 2},
    "01": {"num_images": 2, "num_inference_steps": 5, "seed": 3, "greedy_steps": 0, "latency_repeats": 0},
    "02": {"num_images": 2, "num_inference_steps": 6, "seed": 4},
    "03": {"batch_size": 4, "learning_rate": 2e-4, "seed": 5, "max_train_steps": 2, "ablation_steps": 0,
           "num_images": 2, "num_validation_images": 4, "num_train_scenes": 16, "lr_warmup_steps": 1,
           "num_inference_steps": 7},
    "04": {"num_images": 20, "guidance_scale": 3.0, "num_inference_steps": 6, "guidances": "", "untrained": False},
    "05": {"max_train_steps": 2, "batch_size": 2, "full_learning_rate": 3e-4, "methods": "full", "models": "teacher",
           "num_class_images": 2, "num_images": 1, "drift_steps": 0, "num_inference_steps": 5, "guidance_scale": 3.0},
    "06": {"lcm_steps": 2, "learning_rate": 4e-4, "few_steps": "4", "num_images": 2, "formats": "", "batch_size": 2},
}  # fmt: skip
EXCEPT = {"lr_schedule", "ema_decay", "mixed_precision", "checkpoint_steps", "max_train_steps", "image_format", "size"}


SLOW = [pytest.param(number, marks=pytest.mark.slow if number in ("03", "04", "05") else pytest.mark.nightly)
        for number in SMALL]  # fmt: skip


@pytest.mark.parametrize("number", SLOW)
def test_the_configuration_is_what_trainer_sampler_and_scorer_got(number, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "BKSDM_RECORD": str(tmp_path / "record.jsonl")}
    given = [part for name, value in SMALL[number].items() for part in ("-p", name, str(value))]
    images = ["-p", "images_dir", str(tmp_path / "images")] if "images_dir" in CLASSES[number].model_fields else []
    if number == "06":  # which has nothing to distil without a student
        teacher = UNet2DConditionModel.from_pretrained(ROOT / "data" / "storybook" / "teacher", subfolder="unet")
        build_student(teacher.float(), "bk_tiny").save_pretrained(tmp_path / "student")
        given += ["-p", "student", str(tmp_path / "student")]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "bksdm_utils", "run", number, *given, *images, "-p", "output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    config = CLASSES[number](**json.loads((folder / "config.json").read_text()))
    result = json.loads((folder / "result.json").read_text())
    assert CLASSES[number](**result["config"]) == config
    for name, value in SMALL[number].items():
        assert getattr(config, name) == getattr(CLASSES[number](**{name: str(value)}), name)
    seen = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert seen
    _compare(number, config, seen)


def _compared(number, kind, values, config):
    """The values that must be the configuration's: all that it names, but for what a notebook varies on purpose."""
    shared = {n: v for n, v in values.items() if n in type(config).model_fields and n not in EXCEPT}
    if kind == "sampler":  # few-step students are sampled without guidance
        names = ("seed",) if number == "06" else ("guidance_scale", "seed")
        return {n: v for n, v in shared.items() if n in names}
    if number in ("05", "06") and kind == "trainer":
        return {n: v for n, v in shared.items() if n in ("batch_size", "seed", "optimizer", "weight_decay")}
    if number == "01":  # its toggles sample six images, the scan num_images
        shared.pop("num_images")
    return shared


RATES = {"03": 2e-4, "05": 3e-4, "06": 4e-4}


def _compare(number, config, seen):
    for kind, values in seen:
        for name, value in _compared(number, kind, values, config).items():
            own = getattr(config, name)
            assert value == (list(own) if isinstance(own, tuple) else own), (kind, name)
    first = {kind: values for kind, values in reversed(seen)}
    if number in ("00", "01", "02"):
        assert first["scorer"]["num_images"] == config.num_images
        assert first["scorer"]["guidance_scale"] == config.guidance_scale
    if number == "06":
        guided = {values["guidance_scale"] for kind, values in seen if kind == "sampler"}
        assert guided <= {1.0, config.guidance_scale} and config.guidance_scale in guided
    if number in RATES:
        assert first["trainer"]["learning_rate"] == RATES[number] and first["trainer"]["max_train_steps"] == 2
