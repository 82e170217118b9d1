"""Step times, losses and memory peaks, counted the same way for every framework."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import torch

__all__ = ["Meter"]

WARMUP_STEPS = 2


class Meter:
    """Counts one run. The framework calls ``step_begin`` and ``step_end`` around each optimizer step.

    Args:
        device: ``cuda`` or ``cpu``.
        tokens_per_step: ``batch * tokens``.

    """

    def __init__(self, device: str, tokens_per_step: int) -> None:
        self.cuda = device != "cpu"
        self.tokens_per_step = tokens_per_step
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.setup: dict[str, Any] = {}
        self._start = time.perf_counter()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def step_begin(self) -> None:
        """Start the clock; at the first step, the peaks of building the model are put aside."""
        now = self._now()
        if not self.setup:
            self.setup = {"setup_seconds": round(now - self._start, 3), **self._peaks("setup_")}
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
        self._begin = self._now()

    def step_end(self) -> None:
        """Stop the clock."""
        self.seconds.append(self._now() - self._begin)

    def _peaks(self, prefix: str) -> dict[str, int]:
        if not self.cuda:
            return {}
        statistic = torch.cuda.memory_stats()
        return {
            f"{prefix}peak_requested_bytes": statistic.get("requested_bytes.all.peak", 0),
            f"{prefix}peak_allocated_bytes": statistic.get("allocated_bytes.all.peak", 0),
            f"{prefix}peak_reserved_bytes": statistic.get("reserved_bytes.all.peak", 0),
        }

    def report(self) -> dict[str, Any]:
        """Return what was counted: peaks are those of training, ``setup_`` ones of building the model."""
        found: dict[str, Any] = {**self.setup, **self._peaks("")}
        found["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found["losses"] = [round(loss, 6) for loss in self.losses]
        if self.seconds:
            step = statistics.median(self.seconds[WARMUP_STEPS:] or self.seconds)
            found["step_seconds"] = round(step, 6)
            found["tokens_per_second"] = round(self.tokens_per_step / step, 1)
            found["steps"] = len(self.seconds)
        return found
