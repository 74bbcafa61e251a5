"""The fastest micro-batch that fits, found by dry runs (notebook 03's `find_batch_size`)."""

from __future__ import annotations

import time

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size

from ..config.training import divisors
from .rng import BatchRng
from .trainer import LossFunction, Trainer


def find_micro_batch(trainer: Trainer, loss_function: LossFunction, batches) -> dict[int, float]:
    """Measures micro-batches by dry runs and takes the fastest that fits; the global batch stays as it is.

    Nothing is trained: gradients are discarded, no step is counted. Memory that the optimizer will need is left free.
    The search ends with the first size that does not fit, or the second in succession that is no faster.

    Returns:
        images a second, by size.
    """
    share, rates, slower = trainer.config.global_batch_size // trainer.accelerator.num_processes, {}, 0
    for size in divisors(share):
        try:
            rate = _dry_run(trainer, loss_function, batches, size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            break
        if not _fits(trainer):
            break
        slower = slower + 1 if rate < 1.02 * max(rates.values(), default=0) else 0
        rates[size] = round(rate, 2)
        if slower == 2:
            break
    sizes = gather_object([max(rates, key=rates.get, default=1)])
    trainer.micro_batch_size, trainer.num_micro_batches = min(sizes), share // min(sizes)  # fits all processes
    if trainer.on_gpu:
        torch._dynamo.reset()  # what was compiled for the other sizes
    return rates


def _dry_run(trainer: Trainer, loss_function: LossFunction, batches, size: int) -> float:
    config = trainer.config
    rng = BatchRng(config.seed, trainer.step, range(size), config.global_batch_size, batches.num_examples)
    if trainer.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):  # the first pass warms up
            started = time.perf_counter()
            with trainer.autocast():
                losses = loss_function(trainer.model, batches(rng))
            losses["loss"].backward()
            if trainer.on_gpu:
                torch.cuda.synchronize()
        return size / (time.perf_counter() - started)
    finally:
        trainer.model.zero_grad()  # also after a pass that ran out of memory


def _fits(trainer: Trainer) -> bool:
    """Whether the optimizer's state would still fit on the GPU, with a tenth to spare."""
    if not trainer.on_gpu:
        return True
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()  # another program's, this notebook's kernel for one
    return torch.cuda.max_memory_allocated() + trainer.training_bytes()["optimizer"] < 0.9 * (total - others)
