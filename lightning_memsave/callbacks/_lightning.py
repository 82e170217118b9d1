"""The one place that decides between ``lightning.pytorch`` and ``pytorch_lightning``.

A callback that inherits from both ``Callback`` classes is accepted by both Trainers and both CLIs. Where one
namespace is installed, it alone is the base. (``pip install lightning`` brings both; the second import costs 0.1 s.)
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_memsave.errors import ConfigurationError, MissingDependencyError
from lightning_memsave.strategies._registry import register_names

__all__ = ["NAMESPACES", "Callback", "NotACallback", "namespace_of", "of_every_namespace", "strategy_kind"]

NAMES = ("lightning.pytorch", "pytorch_lightning")


def _installed() -> list[ModuleType]:
    found = []
    for name in NAMES:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                raise
    if not found:
        raise MissingDependencyError(
            "lightning_memsave's callbacks need PyTorch Lightning, and neither 'lightning' nor 'pytorch_lightning' is "
            "installed. Install one: pip install lightning"
        )
    return found


NAMESPACES = _installed()
for _namespace in NAMESPACES:
    register_names(importlib.import_module(f"{_namespace.__name__}.strategies").StrategyRegistry)


def of_every_namespace(path: str) -> type:
    """Return a class that is ``path``, e.g. ``strategies.DDPStrategy``, of every namespace that is installed.

    The first namespace's methods run; the second makes ``isinstance`` true for its Trainer too.
    """
    place, _, name = path.rpartition(".")
    modules = [importlib.import_module(f"{n.__name__}.{place}") if place else n for n in NAMESPACES]
    about = f"Lightning's {name}, of every namespace that is installed."
    return type(name, tuple(getattr(m, name) for m in modules), {"__doc__": about, "__module__": __name__})


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = of_every_namespace("Callback")


class NotACallback:
    """Mixin of what belongs into another argument of the Trainer, and is easily put among the callbacks."""

    belongs = ""

    @property
    def state_key(self) -> str:
        """Say where it belongs: the Trainer asks callbacks for this, and nothing else."""
        raise ConfigurationError(
            f"{type(self).__name__} is not a callback, and was found in Trainer(callbacks=[...]). "
            f"Write Trainer({self.belongs.format(type(self).__name__)})."
        )


def namespace_of(trainer: Any) -> ModuleType:
    """Return the namespace (``lightning.pytorch`` or ``pytorch_lightning``) a Trainer comes from."""
    for namespace in NAMESPACES:
        if isinstance(trainer, namespace.Trainer):
            return namespace
    raise TypeError(
        f"expected a Trainer of {' or '.join(NAMES)}, got {type(trainer).__module__}.{type(trainer).__qualname__}"
    )


_KINDS = {
    "BlockDDPStrategy": "memsave_ddp",
    "FSDP2Strategy": "memsave_fsdp2",
    "PipelineStrategy": "memsave_pipeline",
    "TensorParallelStrategy": "memsave_tensor_parallel",
    "ZeROStrategy": "memsave_zero",
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp1",
    "ModelParallelStrategy": "fsdp2",
    "DDPStrategy": "ddp",
    "SingleDeviceStrategy": "single",
}


def strategy_kind(strategy: Any) -> str:
    """Return the column of the compatibility table a strategy belongs to.

    Returns:
        One of ``STRATEGIES`` of the compatibility table, or ``other``.

    """
    for cls in type(strategy).__mro__:
        kind = _KINDS.get(cls.__name__)
        if kind == "ddp" and getattr(strategy, "_start_method", "popen") != "popen":
            return "ddp_spawn"
        if kind is not None:
            return kind
    return "other"
