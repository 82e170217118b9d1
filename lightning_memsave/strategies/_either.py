"""What a strategy of this package adds so that the Trainers of both namespaces can use one object.

The class has Lightning's strategy of both namespaces as bases, and the methods of the first one run. The few places
where those make objects of their own namespace, or insist on them, follow the Trainer's namespace here instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lightning_memsave.callbacks._lightning import NAMESPACES, NotACallback
from lightning_memsave.strategies._registry import as_memsave_run

__all__ = ["EitherTrainer"]


class EitherTrainer(NotACallback):
    """Mixin, before Lightning's class in the list of bases."""

    belongs = "strategy={}(...)"

    @property
    def namespace(self) -> ModuleType:
        """The namespace of the Trainer, told by the accelerator it gave to this strategy."""
        accelerator = getattr(self, "_accelerator", None)
        for namespace in NAMESPACES:
            if isinstance(accelerator, importlib.import_module(f"{namespace.__name__}.accelerators").Accelerator):
                return namespace
        return NAMESPACES[0]

    def _from_namespace(self, place: str, name: str) -> Any:
        return getattr(importlib.import_module(f"{self.namespace.__name__}.{place}"), name)

    def _configure_launcher(self) -> None:
        # The Trainer ends the other processes of its own launcher only.
        strategy: Any = self
        if strategy._start_method == "popen":
            launcher = _through_memsave_run(self._from_namespace("strategies.launchers", "_SubprocessScriptLauncher"))
            strategy._launcher = launcher(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        else:
            launcher = self._from_namespace("strategies.launchers", "_MultiProcessingLauncher")
            strategy._launcher = launcher(strategy, start_method=strategy._start_method)

    @property
    def checkpoint_io(self) -> Any:
        """What writes and reads checkpoint files."""
        found = super().checkpoint_io  # type: ignore[misc]
        if getattr(found, "checkpoint_io", found) is None:  # a wrapper of the other namespace, with nothing in it
            found.checkpoint_io = self._plain_checkpoint_io()
        return found

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        self._checkpoint_io = io

    @staticmethod
    def _plain_checkpoint_io() -> Any:
        fabric = "lightning.fabric" if NAMESPACES[0].__name__ == "lightning.pytorch" else "lightning_fabric"
        return importlib.import_module(f"{fabric}.plugins").TorchCheckpointIO()

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers of this run."""
        found: list[Any] = self._optimizers
        return found

    @optimizers.setter
    def optimizers(self, optimizers: list[Any]) -> None:
        wrapper = self._from_namespace("core.optimizer", "LightningOptimizer")
        self._optimizers = optimizers
        self._lightning_optimizers = [wrapper._to_lightning_optimizer(optimizer, self) for optimizer in optimizers]

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run one optimizer step through the precision plugin."""
        strategy: Any = self
        return strategy.precision_plugin.optimizer_step(
            optimizer, model=model or strategy.lightning_module, closure=closure, **kwargs
        )


def _through_memsave_run(launcher: Any) -> Any:
    """Return the launcher's class with processes started the way this one was."""

    class Launcher(launcher):  # type: ignore[misc]
        def _call_children_scripts(self) -> None:
            with as_memsave_run():
                super()._call_children_scripts()

    return Launcher
