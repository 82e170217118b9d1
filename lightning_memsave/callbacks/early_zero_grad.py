"""Free the gradients right after the optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._lightning import NAMESPACES
from lightning_memsave.callbacks._precision_checks import check_precision
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session
from lightning_memsave.optim.zero_grad import StepWatch, drop_gradients, gradient_bytes
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["EarlyZeroGrad"]

_NAME = "EarlyZeroGrad"


class _Run:
    """The state of one fit: which optimizers stepped, and whether the module leaves zeros instead of None."""

    def __init__(self, session: Session, module: Any) -> None:
        self.inactive = _inactive(session, module)
        self.watch = StepWatch([] if self.inactive else session.trainer.optimizers)
        stock = [namespace.LightningModule.optimizer_zero_grad for namespace in NAMESPACES]
        # An override of ours to respect: freeing where it writes zeros would change which parameters are stepped.
        self.frees: bool | None = True if type(module).optimizer_zero_grad in stock else None
        self.zeroed = False

    def close(self) -> None:
        self.watch.close()


class EarlyZeroGrad(Saver):
    """Free gradients right after the optimizer step instead of after the next forward.

    Lightning clears the gradients of a step only when the next forward is over, so they are held beside its
    activations. With accumulation they are freed when the window ends.

    **Saves** all gradients during the forward: ``itemsize`` bytes a trainable parameter (4 in fp32).
    Nothing under DDP with ``gradient_as_bucket_view=True``, where gradients live in the buckets.
    **Costs** nothing. Gradients are ``None`` from this callback's ``on_train_batch_end`` on: read them in
    ``on_before_optimizer_step``, or in a callback that stands before this one in the list.
    **Numerics** are bitwise equal.
    **Does not combine with** manual optimization and DeepSpeed, whose gradients it leaves alone and says so.

    Example:
        >>> from lightning_memsave import EarlyZeroGrad
        >>> callback = EarlyZeroGrad()

    Source:
        The order of Lightning's automatic optimization: training_step, zero_grad, backward, step.

    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the precision fits what will be trained."""
        check_precision(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching the optimizers."""
        session = Session.of(trainer)
        run = _run(trainer, pl_module)
        if run.inactive:
            session.report(_NAME, f"inactive: {run.inactive}")
            return
        size = format_bytes(gradient_bytes(trainer.optimizers, expected=True))
        how = "" if run.frees else ", if the module's own optimizer_zero_grad sets them to None"
        session.report(_NAME, f"free {size} of gradients after each step, before the next forward{how}")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """See what the module's own ``optimizer_zero_grad`` left, once."""
        run = _run(trainer, pl_module)
        if run.frees is None and run.zeroed:
            run.frees = gradient_bytes(trainer.optimizers) == 0
            if not run.frees:
                Session.of(trainer).report(_NAME, "inactive: the module's optimizer_zero_grad keeps gradient tensors")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Free the gradients of the optimizers that stepped."""
        run = _run(trainer, pl_module)
        stepped = run.watch.take()
        run.zeroed = bool(stepped)  # the next backward is then the first of a window: zero_grad runs before it
        if run.frees:
            drop_gradients(stepped)


def _run(trainer: Any, module: Any) -> _Run:
    session = Session.of(trainer)
    return session.shared(_NAME, lambda: _Run(session, module))


def _inactive(session: Session, module: Any) -> str:
    if not module.automatic_optimization:
        return "the module optimizes manually; call optimizer.zero_grad(set_to_none=True) right after optimizer.step()"
    if "GradientRelease" in session.methods:
        return "GradientRelease frees each gradient inside backward"
    if session.strategy_kind in ("deepspeed", "memsave_zero"):
        return "DeepSpeed frees its gradients itself"
    if not all(hasattr(optimizer, "register_step_post_hook") for optimizer in session.trainer.optimizers):
        return "the optimizer is not a torch.optim.Optimizer"
    return ""
