"""Follow chosen steps of a run, keep the worst, and cost nothing in all the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_memsave.memory.host import host_allocator, host_peak_bytes, reset_host_peak
from lightning_memsave.memory.ledger import Measurement
from lightning_memsave.memory.report import MemoryReport, set_last_report
from lightning_memsave.memory.snapshot import cuda_in_use, record_snapshot, requested_bytes, reserved_peak_bytes
from lightning_memsave.memory.tracker import MemoryTracker

__all__ = ["StepRecorder", "write_report"]

_TIMED_STEPS = 10
COMPILED_NOTE = "torch.compile'd modules ran uncompiled while they were profiled; compiled, their activations differ."
PARTIAL_NOTE = "the step ended in an exception; the peak is the one up to it."
NO_RESET_NOTE = "the peak resident set is the one since the process began: this system does not let it start again."


class StepRecorder:
    """The memory of chosen steps of one run.

    Args:
        steps: Training steps to follow, 1-based.
        snapshot: Where to write the CUDA allocator's history of the followed steps; ``None`` for none.

    """

    def __init__(self, steps: Iterable[int], *, snapshot: Path | None = None) -> None:
        self.steps = frozenset(steps)
        self.step = 1
        self.validations = 0
        self.by_rank: tuple[int, ...] = ()
        self.snapshot = snapshot
        self._snapshot = ExitStack()
        self._tracker: MemoryTracker | None = None
        self._tracked_step = 0
        self._began = 0.0
        self._profiled_seconds: list[float] = []
        self._plain_seconds: list[float] = []
        self._found: list[tuple[int, Measurement]] = []  # step (0 for validation), measurement
        self._notes: dict[str, None] = {}  # ordered, once each
        if not reset_host_peak():
            self._notes[NO_RESET_NOTE] = None

    @property
    def tracker(self) -> MemoryTracker | None:
        """The tracker of the step that runs, if it is followed."""
        return self._tracker

    # -- steps ----------------------------------------------------------------------------------------------------
    def begin_step(self, module: nn.Module, optimizers: Iterable[Optimizer], batch: Any) -> None:
        """Start a training step (or one micro-batch of it); follow it if it was chosen."""
        self.abandon()
        if self.step in self.steps:
            if self.snapshot is not None and self.step == min(self.steps):
                self._snapshot.enter_context(record_snapshot(self.snapshot))
            self._follow(module, optimizers, batch, "forward")
            self._tracked_step = self.step
        elif len(self._plain_seconds) >= _TIMED_STEPS:
            return
        _synchronize()
        self._began = time.perf_counter()

    def end_step(self, *, last_of_step: bool) -> Measurement | None:
        """End what ``begin_step`` started.

        Args:
            last_of_step: Whether the optimizer stepped, so that the next micro-batch belongs to the next step.

        Returns:
            The measurement, if it was followed.

        """
        measurement = None
        if self._began:
            _synchronize()
            seconds = time.perf_counter() - self._began
            (self._plain_seconds if self._tracker is None else self._profiled_seconds).append(seconds)
            self._began = 0.0
        if self._tracker is not None:
            measurement = self._unfollow()
        if last_of_step:
            if self.step == max(self.steps):
                self._snapshot.close()
            self.step += 1
        return measurement

    def begin_validation(self, module: nn.Module, optimizers: Iterable[Optimizer], batch: Any) -> None:
        """Follow one validation batch."""
        self.abandon()
        self.validations += 1
        self._follow(module, optimizers, batch, "validation")
        self._tracked_step = 0

    def end_validation(self) -> Measurement | None:
        """End what ``begin_validation`` started."""
        return None if self._tracker is None else self._unfollow()

    def abandon(self) -> None:
        """End a step that did not reach its end (an exception, a skipped epoch); what was seen is kept."""
        self._began = 0.0
        if self._tracker is not None:
            self._notes[PARTIAL_NOTE] = None
            self._unfollow()

    def close(self) -> None:
        """Take every hook away; a second call does nothing."""
        try:
            self.abandon()
        finally:
            self._snapshot.close()

    def _follow(self, module: nn.Module, optimizers: Iterable[Optimizer], batch: Any, phase: str) -> None:
        if any(_is_compiled(m) for m in module.modules()):
            self._notes[COMPILED_NOTE] = None
        tracker = MemoryTracker(module, optimizers, batch)
        requested = requested_bytes()
        with ExitStack() as undo:
            undo.callback(tracker.__exit__, None, None, None)
            tracker.__enter__()
            tracker.set_phase(phase)
            undo.pop_all()
        if requested is not None:
            known = sum(nbytes for block, nbytes in tracker.log.initial if block.device == "cuda")
            tracker.log.untracked_bytes = max(0, requested - known)
        self._tracker = tracker

    def _unfollow(self) -> Measurement:
        tracker, self._tracker = self._tracker, None
        assert tracker is not None
        tracker.__exit__(None, None, None)
        measurement = tracker.measurement()
        self._found.append((self._tracked_step, measurement))
        return measurement

    # -- result -----------------------------------------------------------------------------------------------------
    def gather(self, device: torch.device) -> None:
        """Collect every rank's peak; a collective, so every rank must call it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            peak = torch.tensor([self._peak()], dtype=torch.int64, device=device)
            peaks = [torch.empty_like(peak) for _ in range(dist.get_world_size())]
            dist.all_gather(peaks, peak)
            self.by_rank = tuple(int(p.item()) for p in peaks)

    def report(self) -> MemoryReport | None:
        """Return the report of the step with the highest peak, or ``None`` if no step was followed."""
        if not self._found:
            return None
        step, worst = max(self._found, key=lambda item: item[1].peak_bytes)
        by_phase: dict[str, int] = {}
        for _, measurement in self._found:
            for phase, nbytes in measurement.by_phase.items():
                by_phase[phase] = max(nbytes, by_phase.get(phase, 0))
        seconds = self._plain_seconds or self._profiled_seconds
        return MemoryReport.from_measurement(
            worst,
            by_phase=by_phase,
            step=step,
            step_seconds=statistics.median(seconds) if seconds else 0.0,
            reserved_bytes=reserved_peak_bytes() if worst.device == "cuda" else None,
            host_peak_bytes=host_peak_bytes(),
            host_allocator=host_allocator(),
            by_rank=self.by_rank,
            notes=tuple(self._notes),
        )

    def _peak(self) -> int:
        return max((m.peak_bytes for _, m in self._found), default=0)


def write_report(report: MemoryReport, directory: Path, formats: Iterable[str]) -> list[Path]:
    """Write ``memory.<format>`` files and make the report the process's last.

    Args:
        report: The report.
        directory: Made if it does not exist.
        formats: ``json``, ``html``, ``png``, ``svg``.

    """
    set_last_report(report)
    written = []
    for name in formats:
        path = directory / f"memory.{name}"
        write = {"json": report.to_json, "html": report.to_html}.get(name, report.figure)
        written.append(write(path))
    return written


def _is_compiled(module: nn.Module) -> bool:
    """Return whether ``module.compile()``, ``torch.compile(module)`` or that of a LightningModule made it."""
    marks = ("_compiled_call_impl", "_compiler_ctx", "_orig_mod")
    return any(getattr(module, mark, None) is not None for mark in marks)


def _synchronize() -> None:
    if cuda_in_use():
        torch.cuda.synchronize()
