"""Write, read and compare one checkpoint after the first step, so that a bad combination fails then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._rehearsal_run import Rehearsal, why_not
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CheckpointRehearsal"]

_NAME = "CheckpointRehearsal"


class _Run:
    """The state of one fit: the step it began with, and whether the rehearsal is over."""

    def __init__(self, trainer: Any) -> None:
        self.first_step = trainer.global_step
        self.over = False

    def close(self) -> None:
        self.over = True


class CheckpointRehearsal(Saver):
    """Write, read and compare one checkpoint after the first optimizer step.

    An optimizer whose state cannot be saved, or comes back as something else, on this strategy, is found out when
    nothing is lost instead of when the first checkpoint is due. The checkpoint is made exactly as the Trainer makes
    its own, in the folder its own go to, read with ``weights_only=True``, compared bit by bit with what trains, loaded
    back, and removed. The run goes on with every bit as it was.

    **Saves** nothing: finds out in the first step what would be lost at the end.
    **Costs** the size of one checkpoint on disk and the time to write, read and compare it, once; both are reported.
    Optimizers that load in a way of their own (8-bit, host offload, FSDP2) are loaded back for real: their state twice
    for a moment. Others are loaded one parameter at a time.
    **Numerics** are bitwise equal.
    **Does not combine with** nothing; it skips, and says so, where the Trainer writes no checkpoints. On FSDP1 and
    DeepSpeed the checkpoint is written, and not compared.

    Raises:
        CheckpointMismatchError: After the first step, on every rank, if the checkpoint cannot be written, read or
            loaded, or something in it comes back different; the message names it.

    Example:
        >>> from lightning_memsave import CheckpointRehearsal
        >>> callback = CheckpointRehearsal()

    Source:
        https://github.com/bitsandbytes-foundation/bitsandbytes/issues/89, https://github.com/pytorch/ao/issues/1185.

    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where training begins, or say why there is nothing to rehearse."""
        session = Session.of(trainer)
        run = session.shared(_NAME, lambda: _Run(trainer))
        reason = why_not(trainer)
        if reason and not run.over:
            run.over = True
            session.report(_NAME, f"skipped: {reason}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Rehearse once, after the first step of this run."""
        session = Session.of(trainer)
        run = session.shared(_NAME, lambda: _Run(trainer))
        if run.over or trainer.global_step == run.first_step:
            return
        run.over = True
        done = Rehearsal(session).run()
        if done.problems:
            shown = "\n".join(f"  {problem}" for problem in done.problems)
            raise CheckpointMismatchError(
                f"{_NAME}: a checkpoint of this run would not bring it back (tried after step {trainer.global_step}, "
                f"nothing is lost):\n{shown}\nUse another optimizer, strategy or callback for what is named, or remove "
                f"{_NAME} if you do not need to resume."
            )
        for note in done.notes:
            session.report(_NAME, note, warning=True)
        session.report(
            _NAME,
            f"a checkpoint of {format_bytes(done.size)} was written, {done.how} in {done.seconds:.1f} s "
            f"({done.writing:.1f} s to write), and removed",
        )
