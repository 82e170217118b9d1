"""Peak memory as a metric for a module's own ``self.log``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric  # noqa: TID253 - this file is imported when PeakMemory is asked for, and only then

from lightning_memsave.memory.host import host_peak_bytes, reset_host_peak

__all__ = ["PeakMemory"]


class PeakMemory(Metric):
    """Measure the peak memory since the last reset, over all ranks.

    On CUDA it is the most bytes that tensors held on the metric's device; on the CPU the highest resident set of the
    process. ``compute`` gives bytes as a float64 scalar: the maximum over ranks, exact up to 2**53.

    **Saves** nothing.
    **Costs** one read of a counter per update.
    **Numerics** are not touched.
    **Does not combine with** another user of the same counters: a reset starts CUDA's peak counter of the device, or
    the kernel's peak counter of the process, again. Where the kernel does not allow it, the peak is the one since the
    process began.

    Args:
        **kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> from lightning_memsave import PeakMemory
        >>> peak = PeakMemory()
        >>> peak.update()
        >>> float(peak.compute()) > 0
        True

    In a LightningModule::

        def __init__(self):
            super().__init__()
            self.peak_memory = PeakMemory()

        def training_step(self, batch, batch_idx):
            self.peak_memory.update()
            self.log("peak_memory", self.peak_memory, on_step=False, on_epoch=True)

    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    peak_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        self.add_state("peak_bytes", default=zero, dist_reduce_fx="max")

    def update(self) -> None:
        """Read the peak so far."""
        self.peak_bytes = torch.full_like(self.peak_bytes, float(self._read()))

    def compute(self) -> Tensor:
        """Return the peak in bytes, float64."""
        return self.peak_bytes

    def reset(self) -> None:
        """Start again from what is held now."""
        super().reset()
        device = self.peak_bytes.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_host_peak()

    def _read(self) -> int:
        device = self.peak_bytes.device
        if device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(device))
        return host_peak_bytes()
