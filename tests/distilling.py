"""Short distillations of a narrow teacher (fixture `narrow`), for tests and the processes they start."""

from safetensors.torch import load_file

from bksdm_utils.config.training import KDTraining
from bksdm_utils.files import write_json
from bksdm_utils.training.job import prepare


def scores(pipeline):
    """A validation that takes no time."""
    return {"score": float(next(pipeline.unet.parameters()).detach().abs().mean())}


def write_config(folder, **parameters):
    """The configuration of a run with these parameters, also as its config.json."""
    config = KDTraining.filled(device="cpu", **parameters)
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    return config


def prepared(folder, **parameters):
    return prepare(write_config(folder, **parameters), folder, "cpu", scores)


def trained(folder, **parameters):
    """A run in this process, as the notebook does it; its rows and the raw weights of its last step."""
    job = prepared(folder, **parameters)
    rows = [rows for rows, _ in job.progress(job.config.num_processes)][-1]
    return rows, {name: tensor.clone() for name, tensor in job.student.state_dict().items()}


def without_clock(rows):
    """What of a log must not depend on the background load."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "memory_gb")} for r in rows]


def losses(rows):
    return [row["loss"] for row in rows]


def newest(folder, part="unet"):
    last = max((folder / "checkpoints").glob("step_*"))
    return load_file(last / part / "diffusion_pytorch_model.safetensors")
