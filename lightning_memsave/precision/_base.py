"""What our precision plugins share: both namespaces, and the end of a run without callbacks."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._lightning import NAMESPACES, NotACallback, of_every_namespace
from lightning_memsave.callbacks._session import Session

if TYPE_CHECKING:
    from lightning.pytorch.plugins.precision import Precision
else:
    Precision = of_every_namespace("plugins.precision.Precision")

__all__ = ["PrecisionPlugin", "end_session"]


class PrecisionPlugin(NotACallback, Precision):
    """A precision plugin that Trainers of every namespace accept."""

    belongs = "plugins=[{}(...)]"

    def _clip_gradients(self, model: Any, *args: Any, **kwargs: Any) -> None:
        # The inherited method looks for a LightningModule of its own namespace, and clips nothing if it finds another.
        for namespace in NAMESPACES:
            if isinstance(model, namespace.LightningModule):
                namespace.plugins.precision.Precision._clip_gradients(self, model, *args, **kwargs)
                return

    def __repr__(self) -> str:
        """Return the call that makes this plugin; defaults are left out."""
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, parameter in inspect.signature(type(self).__init__).parameters.items()
            if name != "self" and getattr(self, name) != parameter.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def end_session(module: Any) -> None:
    """End the run's session where no callback of ours is there to do it."""
    trainer = getattr(module, "_trainer", None)
    session = None if trainer is None else Session.find(trainer)
    if session is not None and not session.methods:
        session.end()
