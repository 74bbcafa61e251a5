"""The report of a training step, work shared by the processes of one launch, and signals (notebook 03)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from accelerate import PartialState


@dataclass(frozen=True)
class Step:
    """The report of one optimizer step.

    Attributes:
        step: its number, from 1.
        losses: by name, means over the global batch.
        gradient_norm: before clipping.
        skipped: whether the step was left out because its gradient was not finite.
    """

    step: int
    losses: dict[str, float]
    gradient_norm: float
    skipped: bool
    learning_rate: float
    seconds: float
    images_per_second: float

    def floats(self) -> dict[str, float]:
        """Everything as one row of numbers, and the memory in use in GB."""
        return {"step": self.step, **self.losses, "gradient_norm": self.gradient_norm, "skipped": float(self.skipped),
                "learning_rate": self.learning_rate, "seconds": round(self.seconds, 3),
                "images_per_second": round(self.images_per_second, 2), "memory_gb": memory()}  # fmt: skip


def memory() -> float:
    """GB in use: the peak so far on a GPU, at present on the CPU."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return round(used / 1e9, 3)


def shared_work(count: int, device: torch.device | str = "cpu") -> Iterator[int]:
    """This process's share of range(count); at its end it waits for the others."""
    state = PartialState(cpu=torch.device(device).type == "cpu")
    yield from range(state.process_index, count, state.num_processes)
    state.wait_for_everyone()


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only append themselves to the list; a second SIGINT acts as before.

    SIGTERM may come twice: from whoever sends it, and from a launcher that forwards it to all of its processes.
    """
    noted, before = [], {}

    def note(signum, frame):
        noted.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, before[signum])

    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
