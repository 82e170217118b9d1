"""Refuse optimizers that a quantized and frozen module leaves nothing to, or that touch its packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.optim._refusals import packed_weight_problems

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["check_optimizers", "need_trainable"]


def need_trainable(trainer: Trainer, module: LightningModule, stage: str, subject: str) -> None:
    """Refuse, before the optimizers are made, to train a module that has nothing left to train."""
    if stage != "fit":
        return

    def check() -> None:
        if not any(p.requires_grad for p in module.parameters()):
            raise ConfigurationError(
                f"{subject}: no trainable parameter left in {type(module).__name__}: quantized weights are frozen, and "
                f"nothing else trains. Add LoRA(rank=8) next to {subject}, use QLoRA(rank=16) instead of it, or leave "
                "a head trainable (requires_grad=True)."
            )

    Session.of(trainer).before_optimizers(module, check)


def check_optimizers(trainer: Trainer, module: LightningModule, stage: str, subject: str) -> None:
    """Name the optimizer that is left with nothing, or cannot be given frozen packed weights, before torch fails."""
    if stage != "fit":
        return

    def around(inner: Callable[[], Any]) -> Any:
        try:
            configured = inner()
        except ValueError as error:
            if "empty parameter list" not in str(error):
                raise
            raise ConfigurationError(
                f"{subject}: configure_optimizers of {type(module).__name__} makes an optimizer of no parameters: all "
                f"that it would train is frozen by {subject}. Leave those layers out (WeightQuantization(skip=[...]), "
                "QLoRA(train=[...])), put adapters on them (LoRA(modules=[...])), or do not make that optimizer."
            ) from error
        raise_problems(subject, packed_weight_problems(configured))
        return configured

    Session.of(trainer).around_optimizers(module, around)
