"""Runs cases on the stub, each in a fork of this process, which has the libraries: so each has a GPU of its own.

Asked on stdin, in the environment of the stub; see conftest.py.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch

# diffusers counts GPUs when it is imported; by CUDA, no fork could begin with CUDA any more.
torch._C._cuda_getDeviceCount = lambda: int(os.environ["STUB_GPU_COUNT"])

import gpu.planned  # noqa: E402, F401  registers its cases
from gpu import emulation  # noqa: E402
from gpu.cases import CASES, Place  # noqa: E402

from bksdm_utils.files import write_json  # noqa: E402

SECONDS = 900  # after which a case is ended


def run_forked(name: str, teacher: Path, results: Path) -> None:
    """Runs one case in a fork, whose CUDA begins with the case's own environment; its values go to `results`."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        if not results.is_file():
            write_json(results, {"error": f"the process ended with status {status}"})
        return
    signal.alarm(SECONDS)
    os.dup2(2, 1)  # what it prints is no answer
    os.environ.update(CASES[name].environment)
    with tempfile.TemporaryDirectory() as folder:
        try:
            emulation.install()
            with emulation.emulating() if CASES[name].values else nullcontext():
                content = {"values": CASES[name].run(Place("cuda", Path(folder), teacher))}
        except BaseException as error:
            content = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        write_json(results, content)
    sys.stdout.flush()
    os._exit(0)


def serve() -> None:
    """Answers each line on stdin (case, teacher, file of the results, by tabs) with a line when the case has run."""
    for line in sys.stdin:
        name, teacher, results = line.rstrip("\n").split("\t")
        run_forked(name, Path(teacher), Path(results))
        print(name, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
