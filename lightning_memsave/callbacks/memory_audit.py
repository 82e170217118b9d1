"""``MemoryAudit``: check in the first step that every saver does what it says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session, logger
from lightning_memsave.errors import raise_problems
from lightning_memsave.memory.audit import AuditReport
from lightning_memsave.memory.step_audit import StepAudit
from lightning_memsave.transforms._deferred_audit import count_deferred, deferred_findings
from lightning_memsave.transforms.checkpoint_audit import count_recomputes, recompute_findings

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

__all__ = ["MemoryAudit"]

_KEY = "audit"
# An optimizer that has not stepped by then (loss scaling skips steps, a GAN trains one side first) is reported as such.
_MAX_WINDOWS = 32


class MemoryAudit(Saver):
    """Check in the first training step that every saver does what it says.

    Looks until every optimizer has stepped once, at most 32 accumulation windows: did the selected blocks recompute,
    did every trainable tensor get a gradient, is the optimizer state really 8-bit, which attention kernels can run,
    which weights have a dtype that does not train or wastes memory. Prints a table with ``ok``, ``warning`` and
    ``problem``, writes ``<default_root_dir>/memsave/audit.json``, and takes its hooks off.

    **Saves** nothing.
    **Costs** a hook per optimizer and a look at each torch function of the first step; nothing afterwards.
    **Numerics** are bitwise equal.
    **Combines with** every method and strategy.

    Args:
        strict: Raise if there is a problem, at the end of the step that showed it, when nothing is lost yet. On several
            devices all stop if one finds a problem.

    Raises:
        ConfigurationError: After the first step, if ``strict`` and there is a problem; lists all of them.

    Example:
        >>> from lightning_memsave import MemoryAudit
        >>> MemoryAudit(strict=True)
        MemoryAudit(strict=True)

    """

    def __init__(self, *, strict: bool = False) -> None:
        raise_problems("MemoryAudit", [f"strict={strict!r} must be True or False."] * (type(strict) is not bool))
        self.strict = strict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look into the training steps until the audit is done."""
        super().setup(trainer, pl_module, stage)
        Session.of(trainer).add_context("MemoryAudit", lambda phase: _watching(trainer, phase))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look."""
        session = Session.of(trainer)
        session.shared(_KEY, lambda: _Run(self, session, pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the graph of the loss."""
        run = _find(trainer)
        if run is not None:
            run.audit.saw_loss(loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge once every optimizer has stepped."""
        run = _find(trainer)
        if run is not None and run.owner is self:
            run.end_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a run that was shorter than the audit."""
        run = _find(trainer)
        if run is not None and run.owner is self and run.audit.batches:
            run.judge()


class _Run:
    """One audit."""

    def __init__(self, owner: MemoryAudit, session: Session, module: LightningModule) -> None:
        self.owner = owner
        self.session = session
        self.module = module
        trainer = session.trainer
        self.audit = StepAudit(module, trainer.optimizers, autocast="mixed" in str(trainer.precision))
        self.before = count_recomputes(module)
        self.deferred_before = count_deferred(module)
        self.done = False

    def end_batch(self) -> None:
        self.audit.batches += 1
        most = _MAX_WINDOWS * self.session.trainer.accumulate_grad_batches
        if self.audit.complete or self.audit.batches >= most:
            self.judge()

    def judge(self) -> None:
        """Report, write, and raise if that was asked for."""
        self.close()
        trainer = self.session.trainer
        release = self.session.methods.get("GradientRelease")
        backwards = 2 if getattr(release, "clip", None) == "two_pass" else 1
        findings = [
            *recompute_findings(self.module, self.before, backwards=backwards),
            *deferred_findings(self.module, self.deferred_before),
            *self.audit.findings(),
        ]
        report = AuditReport(findings, self.audit.batches, tuple(self.session.lines))
        if trainer.is_global_zero:
            path = report.to_json(self.session.directory / "audit.json")
            logger.info("%s", report.table())
            count = len(report.problems)
            self.session.report("MemoryAudit", f"{count} problem{'' if count == 1 else 's'}; wrote {path}")
        if self.owner.strict and trainer.strategy.reduce_boolean_decision(bool(report.problems), all=False):
            problems = [f"{finding.check}: {finding.text}" for finding in report.problems]
            raise_problems("MemoryAudit(strict=True)", problems or ["another rank found a problem; see its message."])

    def close(self) -> None:
        """Take the hooks off; a second call does nothing."""
        self.done = True
        self.audit.close()


def _find(trainer: Trainer) -> _Run | None:
    session = Session.find(trainer)
    run = session.find_shared(_KEY) if session is not None else None
    return run if isinstance(run, _Run) and not run.done else None


def _watching(trainer: Trainer, phase: str) -> AbstractContextManager[Any]:
    run = _find(trainer) if phase == "training_step" else None
    return run.audit.watching() if run is not None else nullcontext()
