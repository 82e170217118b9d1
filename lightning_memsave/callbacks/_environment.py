"""What ``LIGHTNING_MEMSAVE`` attaches: a preset, or the callbacks of a YAML file. Imported only when it is set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._apply import apply
from lightning_memsave.callbacks._callback_list import read_callbacks
from lightning_memsave.callbacks._lightning import Callback
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session, logger
from lightning_memsave.callbacks.environment import VARIABLE
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.callbacks.presets import find_methods, preset
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._pass import Stage

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["fabric_callbacks", "load_methods", "trainer_callbacks"]

_MARK = "_memsave_from_environment"
_batches = itertools.count(1)


def load_methods(value: str, *, subject: str = VARIABLE) -> list[Any]:
    """Return fresh callbacks from a preset's name or a YAML file.

    Args:
        value: What the variable holds.
        subject: Where the value comes from, for the message.

    Raises:
        ConfigurationError: If it is neither, or the file does not hold a right list of callbacks.

    """
    found = find_methods(value, subject=subject)
    if isinstance(found, str):
        return preset(found)
    return read_callbacks(found, subject=f"{subject}={value}")


def trainer_callbacks(value: str) -> list[Any]:
    """Return the callbacks for a Trainer, and say so in one line."""
    callbacks, batch = load_methods(value), next(_batches)
    for callback in callbacks:
        setattr(callback, _MARK, batch)
    _say(f"attaching {_names(callbacks)}")
    return [_ExplicitWins(), *callbacks]


class _ExplicitWins(Callback):
    """Drop a saver of the variable where the Trainer or the module brings its own of that class.

    The rule is Lightning's for ``configure_callbacks``: what is nearer to the code wins. It also keeps the first batch
    where one list of callbacks is given to several Trainers, since Lightning adds ours to that very list each time.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        savers = [c for c in callbacks if isinstance(c, Saver)]
        first: dict[type, Saver] = {}
        for callback in sorted(savers, key=_batch):
            winner = first.setdefault(type(callback), callback)
            if _batch(winner) == _batch(callback):
                continue
            # Lightning is walking this list; what is removed here stands behind this callback.
            callbacks.remove(callback)
            if winner.describe() != callback.describe():
                Session.of(trainer).report(
                    VARIABLE, f"the Trainer's own {winner.describe()} is used instead of {callback.describe()}"
                )


def _batch(callback: Saver) -> int:
    """Return which reading of the variable a saver comes from; zero for the project's own, which sort first."""
    number: int = callback.__dict__.get(_MARK, 0)
    return number


def fabric_callbacks(value: str) -> list[Any]:
    """Return the callback for a Fabric, and say in one line what it attaches and what it cannot."""
    callbacks = load_methods(value)
    transforms = [c for c in callbacks if isinstance(c, ModelTransform)]
    others = [c for c in callbacks if not isinstance(c, ModelTransform)]
    line = f"attaching {_names(transforms)} to the modules of this Fabric" if transforms else "nothing for this Fabric"
    _say(f"{line}; {_names(others)} need a Trainer's loop" if others else line)
    return [_FabricTransforms(value, transforms)] if transforms else []


class _FabricTransforms:
    """Apply model transforms in ``Fabric.setup``, where Fabric calls ``on_after_setup``."""

    def __init__(self, value: str, transforms: Sequence[ModelTransform]) -> None:
        self.value = value
        self.transforms = list(transforms)

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Apply them; Fabric has wrapped the module and made its optimizers' links by now."""
        late = [c for c in self.transforms if any(t.stage < Stage.CHECKPOINT for t in c.transforms())]
        if late:
            raise ConfigurationError(
                f"{VARIABLE}={self.value}: {_names(late)} changes parameters, and Fabric calls callbacks after the "
                "optimizer was made. Write lightning_memsave.apply(module, callbacks) before fabric.setup(module, ...) "
                "and unset the variable."
            )
        apply(getattr(module, "module", module), self.transforms)


def _names(callbacks: Sequence[Any]) -> str:
    return ", ".join(repr(c) if isinstance(c, Saver) else type(c).__name__ for c in callbacks)


def _say(line: str) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) == 0:
        logger.info("[memsave] %s=%s: %s", VARIABLE, os.environ.get(VARIABLE, ""), line)
