"""The base class of every callback that changes the model, ours and yours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session
from lightning_memsave.transforms._pass import Applied, Transform

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ModelTransform"]


class ModelTransform(Saver):
    """Change the model once it exists, in an order the package decides.

    Subclass it for a method of your own: set ``stage`` and write ``apply``. It then runs after the module's
    ``setup`` and ``configure_model`` and before weights are restored, sharded or given to an optimizer; on every
    strategy, once, and only while the run lasts.

    **Saves** what the subclass saves.
    **Costs** nothing by itself.
    **Numerics** are those of the subclass.
    **Does not combine with** methods that the compatibility table refuses; the check runs before the model is touched.

    Raises:
        IncompatibleMethodsError: At ``fit``, before the model is touched, if two methods cannot run together.
        NothingToTransformError: At ``fit``, if nothing matched.

    Example:
        >>> from torch import nn
        >>> from lightning_memsave import Applied, ModelTransform, Stage, apply
        >>> class HalfEmbeddings(ModelTransform):
        ...     stage = Stage.KERNEL
        ...
        ...     def apply(self, module):
        ...         found = [m for m in module.modules() if isinstance(m, nn.Embedding)]
        ...         for m in found:
        ...             m.bfloat16()
        ...         return Applied(summary=f"{len(found)} embeddings in bf16", num_modules=len(found))
        >>> model = nn.Sequential(nn.Embedding(10, 4))
        >>> applied = apply(model, [HalfEmbeddings()])
        >>> model[0].weight.dtype
        torch.bfloat16

    """

    stage: ClassVar[int]
    repeatable: ClassVar[bool] = False

    def apply(self, module: nn.Module) -> Applied:
        """Change ``module`` in place and say what was done.

        Raise ``NothingToTransformError`` rather than change nothing. Give every tensor you create a dtype and a
        device: under ``bf16-true`` the default dtype is bf16 here, and the default device is the accelerator.
        """
        raise TypeError(f"{type(self).__name__} must define apply(self, module) -> Applied.")

    def transforms(self) -> Sequence[Transform]:
        """Return what this callback adds to the pass; override it for a method made of several."""
        return [
            Transform(
                name=type(self).__name__,
                stage=self.stage,
                function=self.apply,
                config=self.describe(),
                repeatable=self.repeatable,
            )
        ]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the transforms on the run's pass."""
        super().setup(trainer, pl_module, stage)
        for transform in self.transforms():
            Session.of(trainer).add_transform(transform)
