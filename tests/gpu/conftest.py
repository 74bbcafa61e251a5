"""Values of the same cases on the stub GPU, computed by one process that serves all tests, and on the CPU."""

import json
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import NARROW, narrow_parts
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from gpu import emulation, stub
from gpu.cases import CASES, Place
from transformers import CLIPTextModel

from bksdm_utils.storybook.networks import SCHEDULE

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """Skips the tests of this folder, with the reason, where the stub cannot be built."""
    ours = [item for item in items if HERE in item.path.parents]
    if ours and (reason := stub.missing()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """A Stable Diffusion as `pipeline_dir`, with two stages only: each operation costs time on the stub."""
    vae, tokenizer, text = narrow_parts()
    unet = NARROW | {
        "block_out_channels": [8, 16], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=UNet2DConditionModel.from_config(unet),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher_of_two_stages")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server():
    """A process on the stub that runs cases; the libraries are imported once."""
    environment = stub.environment(start=False)
    process = Popen([sys.executable, HERE / "server.py"], env=environment, stdin=PIPE, stdout=PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def on_gpu(server, teacher_dir, tmp_path):
    """`on_gpu(name)` gives a case's values on the stub, or fails with its error; with `error=True` it gives that."""

    def run(name, error=False):
        results = tmp_path / f"{name}.json"
        server.stdin.write(f"{name}\t{teacher_dir}\t{results}\n")
        server.stdin.flush()
        assert server.stdout.readline() == f"{name}\n", "the process that runs cases has ended"
        content = json.loads(results.read_text())
        if error:
            return content.get("error", "no error")
        assert "error" not in content, content.get("traceback") or content["error"]
        return content["values"]

    return run


@pytest.fixture
def on_cpu(teacher_dir, tmp_path):
    """Runs a case in this process, on the CPU with one thread, attention computed as the stub does."""

    def run(name):
        folder, threads = tmp_path / f"cpu-{name}", torch.get_num_threads()
        folder.mkdir()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)
        try:
            with emulation.matrix_attention():
                return json.loads(json.dumps(CASES[name].run(Place("cpu", folder, teacher_dir))))
        finally:
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


@pytest.fixture
def both(on_gpu, on_cpu):
    """`both(name)` gives a case's values on the stub and on the CPU."""
    return lambda name: (on_gpu(name), on_cpu(name))
