"""Every scheduler of diffusers as a teacher's own: its noise schedule is kept, or it is refused by name."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin

from bksdm_utils.models.pipelines import load_pipeline, with_scheduler

pytestmark = pytest.mark.filterwarnings("ignore")
BETAS = {"num_train_timesteps": 500, "beta_start": 0.0007, "beta_end": 0.013, "beta_schedule": "scaled_linear"}


def importable(name):
    try:
        return isinstance(getattr(diffusers, name), type) and issubclass(getattr(diffusers, name), SchedulerMixin)
    except (ImportError, RuntimeError, AttributeError):
        return False


# Dummies of packages that are not installed have no config to save.
SCHEDULERS = [name for name in sorted(dir(diffusers)) if "Scheduler" in name and importable(name)
              and not name.startswith("Flax") and name not in ("SchedulerMixin", "AysSchedules")]  # fmt: skip


def own(name):
    cls = getattr(diffusers, name)
    try:
        scheduler = cls()
        takes = {key: value for key, value in BETAS.items() if key in scheduler.config}
        return cls(**takes)
    except (ImportError, ValueError, TypeError) as error:
        pytest.skip(f"not made without more: {error}")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_teachers_own_scheduler_keeps_its_schedule_or_is_refused(pipeline_dir, tmp_path, name):
    scheduler, teacher = own(name), shutil.copytree(pipeline_dir, tmp_path / "teacher")
    shutil.rmtree(teacher / "scheduler")
    scheduler.save_pretrained(teacher / "scheduler")
    index = json.loads((teacher / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (teacher / "model_index.json").write_text(json.dumps(index))
    if "beta_schedule" not in scheduler.config or scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        with pytest.raises(ValueError, match="scheduler of .* is a .*expected a noise schedule of betas"):
            load_pipeline(teacher)
        return
    pipeline = load_pipeline(teacher)
    assert type(pipeline.scheduler).__name__ == name
    expected = with_scheduler(pipeline, None).scheduler
    for other in ("pndm", "dpm++", "euler", "ddim"):
        switched = with_scheduler(pipeline, other).scheduler
        assert torch.allclose(switched.alphas_cumprod, _products(expected.config))


def _products(config):
    """The cumulative products of 1 - beta, by the definition of the schedule "scaled_linear"."""
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    return (1 - betas).cumprod(0)
