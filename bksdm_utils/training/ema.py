"""The averaged weights of a training (EMA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.training_utils import EMAModel

CPU_EVERY = 10  # steps


class Average(EMAModel):
    """diffusers' EMA; one on the CPU of a model on a GPU is moved every `CPU_EVERY` steps only.

    After k steps without it, an average of decay d is moved by 1 - d^k: nearly the k single moves, for one copy.

    Args:
        device: where the average is kept; None is the model's device.

    Attributes:
        behind: product of the decays since the average was last moved.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float, device: str | None = None):
        super().__init__(parameters, decay=decay, foreach=True)
        self.to(device)
        self.behind, self._buffers = 1.0, None

    def step(self, parameters: Sequence[torch.nn.Parameter], flush: bool = False) -> None:
        """Takes the weights after one optimizer step into account.

        Args:
            flush: move the average now, however few steps it is behind.
        """
        if all(shadow.device == p.device for shadow, p in zip(self.shadow_params, parameters, strict=True)):
            super().step(parameters)
            return
        self.optimization_step += 1
        self.behind *= self.get_decay(self.optimization_step)
        if self.optimization_step % CPU_EVERY == 0 or flush:
            torch._foreach_lerp_(self.shadow_params, self._copies(parameters), 1 - self.behind)
            self.behind = 1.0

    def _copies(self, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """The weights in page-locked memory, to which a GPU copies without stopping the host for each of them."""
        self._buffers = self._buffers or [torch.empty_like(p, device="cpu", pin_memory=True) for p in parameters]
        for buffer, parameter in zip(self._buffers, parameters, strict=True):
            buffer.copy_(parameter.detach(), non_blocking=True)
        torch.cuda.synchronize()
        return self._buffers
