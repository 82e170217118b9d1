"""The transform pass without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_memsave.callbacks._session import describe, logger
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.planner.compatibility import check_methods
from lightning_memsave.transforms._pass import AppliedTransforms, TransformPass

__all__ = ["apply"]


def apply(module: nn.Module, callbacks: Sequence[Any]) -> AppliedTransforms:
    """Run the same transform pass with no Trainer, in place.

    For inference, Fabric, a plain torch loop, and before weights are loaded from a checkpoint: Trainer callbacks do
    not run there.

    Args:
        module: Any ``nn.Module``; a LightningModule too.
        callbacks: Callbacks that change the model (``LoRA``, ``ActivationCheckpointing`` ...), in any order.

    Returns:
        What was done, in order; ``.undo()`` puts the module back.

    Raises:
        ConfigurationError: If a callback acts on a Trainer rather than on a model.
        IncompatibleMethodsError: If two of them cannot run together; nothing was changed then.
        NothingToTransformError: If one of them matched nothing; nothing is left changed then.

    Example:
        >>> from torch import nn
        >>> from lightning_memsave import ActivationCheckpointing, apply
        >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
        >>> applied = apply(model, [ActivationCheckpointing()])
        >>> applied.undo()

    """
    others = [type(c).__name__ for c in callbacks if not isinstance(c, ModelTransform)]
    if others:
        raise ConfigurationError(
            f"apply: {', '.join(others)} works on a Trainer's loop, not on a model, so it needs one. "
            "Pass it to Trainer(callbacks=...)."
        )
    check_methods({type(c).__name__: c for c in callbacks}, "single")
    transform_pass = TransformPass()
    for callback in callbacks:
        for transform in callback.transforms():
            transform_pass.add(transform)
    applied = transform_pass.run(module)
    for transform, what in applied:
        logger.info("[memsave] %s: %s", transform.name, describe(what))
    return applied
