"""Measure where the memory of chosen training steps goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_memsave._imports import is_available
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session, logger
from lightning_memsave.errors import raise_problems
from lightning_memsave.memory.recorder import StepRecorder, write_report
from lightning_memsave.memory.report import MemoryReport, set_last_report
from lightning_memsave.memory.snapshot import require_cuda

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["MemoryProfiler"]

_FORMATS = ("json", "html", "png", "svg")
_KEY = "memory_profiler"


class MemoryProfiler(Saver):
    """Measure where the memory of chosen training steps goes.

    Bytes are attributed to category and module at the true peak of a step, and to the phases forward, backward,
    optimizer and validation. The results are in ``<default_root_dir>/memsave/memory.json``, ``.html`` and ``.png``,
    in the Trainer's loggers (``memory/peak_bytes``, ``memory/<category>_bytes``), in a table at the end of the fit,
    and in ``last_report()``.

    **Saves** nothing; it shows what to save on.
    **Costs** about 10 microseconds per operation in the chosen steps, nothing in all others.
    **Numerics** are bitwise equal.
    **Does not combine with** measuring compiled code: ``torch.compile``'d modules run uncompiled in the chosen steps.

    Args:
        steps: Training steps to profile, counted from 1 in each fit. With ``accumulate_grad_batches`` a step is all
            the batches up to the optimizer's step. One batch of the first validation is profiled too.
        formats: Files to write: ``json``, ``html``, ``png``, ``svg``.
        snapshot: Also record the CUDA allocator's history over the chosen steps, as
            ``memsave/snapshot-rank<n>.pickle``.

    Raises:
        ConfigurationError: At construction, if a step is below 1 or a format is unknown; at ``fit``, if a snapshot was
            asked for and there is no CUDA device.

    Example:
        >>> from lightning_memsave import MemoryProfiler
        >>> callback = MemoryProfiler(steps=(2, 3), formats=("json",))

    """

    def __init__(
        self,
        *,
        steps: Sequence[int] = (1, 2, 3),
        formats: Sequence[str] = ("json", "html", "png"),
        snapshot: bool = False,
    ) -> None:
        problems = []
        numbers: list[Any] = [steps] if isinstance(steps, (int, float)) else list(steps)
        if not numbers or any(type(n) is not int or n < 1 for n in numbers):
            problems.append(f"steps={steps!r} must be one or more training steps counted from 1, e.g. (1, 2, 3).")
        names = [formats] if isinstance(formats, str) else list(formats)
        if any(name not in _FORMATS for name in names):
            problems.append(f"formats={formats!r} may hold {', '.join(repr(f) for f in _FORMATS)}.")
        raise_problems("MemoryProfiler", problems)
        self.steps = tuple(numbers)
        self.formats = tuple(names)
        self.snapshot = snapshot

    # -- life -----------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the recorder of this run."""
        super().setup(trainer, pl_module, stage)
        session = Session.of(trainer)
        if stage not in ("fit", "validate"):
            session.report(
                "MemoryProfiler", f"profiles fit and validate; nothing is profiled in {getattr(stage, 'value', stage)}"
            )
            return
        if self.snapshot:
            require_cuda("MemoryProfiler(snapshot=True)")
        drawn = [name for name in self.formats if name in ("png", "svg")]
        if drawn and not is_available("matplotlib"):
            session.report(
                "MemoryProfiler",
                f"matplotlib is not installed, so memory.{drawn[0]} is not drawn. Install it: "
                'pip install "lightning-memsave[plot]", or leave the format out.',
                warning=True,
            )
        run = session.shared(_KEY, lambda: _Run(self, session))
        if run.owner is not self:
            session.report(
                "MemoryProfiler", f"asked for twice; {run.owner.describe()} profiles, {self.describe()} does not"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Follow the step if it was chosen."""
        run = self._run(trainer)
        if run is not None:
            run.recorder.begin_step(pl_module, trainer.optimizers, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note that backward is over: clipping and the step come next."""
        run = self._run(trainer)
        if run is not None and run.recorder.tracker is not None:
            run.recorder.tracker.set_phase("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the peak of a followed step."""
        run = self._run(trainer)
        if run is not None:
            run.end_batch(last_of_step=trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Follow one validation batch of the run."""
        run = self._run(trainer)
        if run is not None and not trainer.sanity_checking and not run.recorder.validations:
            run.recorder.begin_validation(pl_module, trainer.optimizers, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Read the peak of a followed validation batch."""
        run = self._run(trainer)
        if run is not None:
            run.recorder.end_validation()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results."""
        self._finish(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of a validation outside of a fit."""
        if trainer.state.fn == "validate":
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        run = self._run(trainer)
        if run is not None:
            run.recorder.close()
            run.recorder.gather(trainer.strategy.root_device)
            run.write()

    def _run(self, trainer: Trainer) -> _Run | None:
        """Return the run's state if this callback owns it (of two profilers, the first profiles)."""
        session = Session.find(trainer)
        run = session.find_shared(_KEY) if session is not None else None
        return run if isinstance(run, _Run) and run.owner is self else None


class _Run:
    """The state of one profiled run."""

    def __init__(self, owner: MemoryProfiler, session: Session) -> None:
        self.owner = owner
        self.session = session
        rank = session.trainer.global_rank
        snapshot = session.directory / f"snapshot-rank{rank}.pickle" if owner.snapshot else None
        self.recorder = StepRecorder(owner.steps, snapshot=snapshot)
        self._reports: list[MemoryReport] = []  # of the batches of the running step
        self._written = False

    def end_batch(self, *, last_of_step: bool) -> None:
        """End one batch; after the last one of a followed step, publish the step."""
        measurement = self.recorder.end_step(last_of_step=last_of_step)
        if measurement is not None:
            self._reports.append(MemoryReport.from_measurement(measurement))
        if not (last_of_step and self._reports):
            return
        set_last_report(self.recorder.report())  # a run that is killed later still leaves this
        scalars: dict[str, float] = dict(max(self._reports, key=lambda report: report.peak_bytes).scalars())
        self._reports.clear()
        trainer = self.session.trainer
        for target in trainer.loggers:
            target.log_metrics(scalars, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def write(self) -> None:
        """Write the files and the table, once."""
        report = self.recorder.report()
        if report is None or self._written:
            return
        self._written = True
        formats = [name for name in self.owner.formats if name not in ("png", "svg") or is_available("matplotlib")]
        if not self.session.trainer.is_global_zero:
            set_last_report(report)
            return
        written = write_report(report, self.session.directory, formats)
        logger.info("%s", report.table())
        if written:
            self.session.report("MemoryProfiler", f"wrote {', '.join(str(path) for path in written)}")

    def close(self) -> None:
        """Stop following, also after an exception; what was seen is written."""
        self.recorder.close()
        self.write()
