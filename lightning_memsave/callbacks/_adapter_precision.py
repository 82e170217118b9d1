"""Keep adapters in their own dtype when the precision plugin casts the module (``precision="bf16-true"``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._session import Session, hook_instance
from lightning_memsave.transforms._adapter_layers import kept_in_dtype

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["keep_adapter_dtype"]


class _KeptDtype:
    """The hook on one precision plugin, for the length of a run."""

    def __init__(self, plugin: Any) -> None:
        self._undo = hook_instance(plugin, "convert_module", self._convert)

    @staticmethod
    def _convert(inner: Callable[[Any], Any], module: Any) -> Any:
        with kept_in_dtype(module):
            return inner(module)

    def close(self) -> None:
        self._undo()


def keep_adapter_dtype(trainer: Trainer) -> None:
    """Let the precision plugin convert everything but the adapters, in this run."""
    Session.of(trainer).shared("adapter_dtype", lambda: _KeptDtype(trainer.precision_plugin))
