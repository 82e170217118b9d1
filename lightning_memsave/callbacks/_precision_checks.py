"""The precision checks of a run: once, whichever callback asks first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import raise_problems
from lightning_memsave.optim.precision_checks import loss_scaling_problems, precision_warnings

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["check_precision"]


class _Checked:
    """Says that the checks of this run are done; what they looked at is not kept."""

    def __init__(self, trainer: Any, module: Any) -> None:
        optimizers = [o for o in trainer.optimizers if hasattr(o, "param_groups")]
        precision = trainer.precision_plugin
        if getattr(precision, "scaler", None) is not None:
            clips = bool(trainer.gradient_clip_val)
            problems = loss_scaling_problems(module.named_parameters(), optimizers, clips=clips)
            raise_problems(f"Trainer(precision={precision.precision!r})", problems)
        keeps = type(precision).__name__ == "BF16Precision"
        for warning in precision_warnings(optimizers, keeps_remainders=keeps):
            Session.of(trainer).report(f"precision={precision.precision!r}", warning, warning=True)

    def close(self) -> None:
        """Nothing was installed."""


def check_precision(trainer: Trainer, module: LightningModule) -> None:
    """Refuse what would fail at the first step, and warn of what would silently not train.

    Call it from ``on_fit_start``, when the optimizers exist and nothing has stepped.
    """
    Session.of(trainer).shared("precision_checks", lambda: _Checked(trainer, module))
