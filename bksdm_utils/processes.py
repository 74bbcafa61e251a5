"""Processes that outlive the notebook that started them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from .files import ROOT, folder_lock, write_json

LOG, NOTE, FINISHED = "process.log", "process.json", "process.finished"
LAST_WORDS = ("failed: ", "stopped by ")  # how the last line of a command begins, among its launcher's tracebacks


def launch(folder: Path, num_processes: int, command: str = "train", config: Mapping | None = None) -> None:
    """Starts `python -m bksdm_utils COMMAND --config FOLDER/config.json` in processes, unless they run already.

    Args:
        config: written as config.json first; None takes the file that exists.

    Raises:
        ValueError: processes with other settings run there; nothing is written then.
    """
    if config is None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {n: value for n, value in config.items() if n not in ("resume", "output_dir", "num_processes")}
    if running(folder):
        if _note(folder)["config"] != json.loads(json.dumps(settings)):
            raise ValueError(f"processes with other settings are running for {folder}: wait for them, stop them by "
                             "bksdm_utils.processes.stop, or use another folder")  # fmt: skip
        print(f"processes are already running for {folder}: following them")
        return
    with folder_lock(folder):  # or another host's processes are running there
        write_json(folder / "config.json", config)
        (folder / FINISHED).unlink(missing_ok=True)
    several = ["--multi_gpu"] if num_processes > 1 else []
    own = folder / "accelerate.json"  # or this user's default_config.yaml would decide: DeepSpeed, FSDP, GPU ids
    write_json(own, {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU" if several else "NO",
                     "use_cpu": False, "debug": False})  # fmt: skip
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(own), *several,
            "--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", "0",
            "-m", "bksdm_utils", command, "--config", str(folder.resolve() / "config.json")]  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 1) // num_processes))  # threads that outnumber cores only spin
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", "OMP_NUM_THREADS": threads, **os.environ,
                   "PYTHONUNBUFFERED": "1"}  # fmt: skip
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    started = psutil.Process(process.pid).create_time()
    note = {"pid": process.pid, "started": started, "host": socket.gethostname(), "config": settings}
    write_json(folder / NOTE, note)


def running(folder: Path) -> bool:
    """Whether processes that `launch` started for this folder are running on this machine."""
    return _launcher(folder) is not None


def follow(folder: Path, every: float = 1.0) -> Iterator[None]:
    """Yields every so many seconds until the processes end. Interrupting this does not stop them.

    Raises:
        RuntimeError: they ended before they were finished; the message has the reason they gave.
    """
    try:
        while running(folder):
            yield
            time.sleep(every)
    except KeyboardInterrupt:
        print("the processes keep running: run this again to follow them; to end them with a checkpoint, "
              "bksdm_utils.processes.stop(run.dir)")  # fmt: skip
        raise
    if not finished(folder):
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        reason = [line for line in lines if line.startswith(LAST_WORDS)] or lines[-12:]
        raise RuntimeError(f"the processes of {folder} ended before the work was finished; resume=True continues. "
                           f"{LOG} says:\n" + "\n".join(reason))  # fmt: skip


def stop(folder: Path) -> None:
    """Asks the processes to end after the step in progress, with a checkpoint; returns at once."""
    launcher = _launcher(folder)
    for process in launcher.children(recursive=True) if launcher else ():
        process.terminate()


def mark_finished(folder: Path) -> None:
    """Called by the processes themselves when the work is finished."""
    (folder / FINISHED).touch()


def finished(folder: Path) -> bool:
    """Whether the work was finished since the last launch."""
    return (folder / FINISHED).exists()


def _note(folder: Path) -> dict:
    path = folder / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _launcher(folder: Path) -> psutil.Process | None:
    note = _note(folder)
    if note.get("host") != socket.gethostname():
        return None
    try:
        process = psutil.Process(note["pid"])
        same = abs(process.create_time() - note["started"]) < 60  # process numbers are reused; a clock may be set
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
