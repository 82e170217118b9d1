"""What every callback of this package does at setup, teardown and on an exception."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from lightning_memsave.callbacks._lightning import Callback
from lightning_memsave.callbacks._session import Session

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Saver"]


class Saver(Callback):
    """A callback that holds configuration only and keeps its run state in the Trainer's session."""

    def describe(self) -> str:
        """Return the callback as the call that makes it, e.g. ``LoRA(rank=8)``; defaults are left out.

        Every ``__init__`` argument must be kept as an attribute of the same name.
        """
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name != "self" and hasattr(self, name) and getattr(self, name) != parameter.default:
                shown.append(f"{name}={getattr(self, name)!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __repr__(self) -> str:
        """Return the call that makes this callback."""
        return self.describe()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make this method known to the run; conflicts are refused before the model is touched."""
        Session.of(trainer).register(self, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take back what does not outlive the run."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take back what changes the model's behaviour; a checkpoint can still be written."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        session = Session.find(trainer)
        if session is not None:
            session.end()
        # Lightning leaves the module's bound ``log`` on every callback: a copy of it would copy the whole module.
        for name in ("log", "log_dict"):
            self.__dict__.pop(name, None)
