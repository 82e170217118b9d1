"""Point what refers to an old optimizer to the one that trains: schedulers, and the functions they call."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memsave.errors import ConfigurationError

__all__ = ["rebind"]

_ENDS = (Optimizer, Tensor, nn.Module, str, bytes, int, float, type, types.ModuleType)


def rebind(value: Any, new: Mapping[int, Optimizer], seen: set[int] | None = None) -> None:
    """Point everything reachable from a scheduler to the new optimizers, in place.

    Followed are containers, schedulers, and what a function took along: its closure, its defaults, the arguments of a
    ``functools.partial``. Of other callables, and of the object of a method, only direct attributes are changed.

    Args:
        value: A scheduler, or anything that holds some.
        new: ``id`` of an old optimizer -> the one that takes its place.
        seen: What was visited.

    Raises:
        ConfigurationError: If a schedule calls a method of an old optimizer.

    """
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, _ENDS):
        return
    seen.add(id(value))
    if isinstance(value, (dict, list)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            renewed = _renewed(item, new, seen)
            if renewed is not item:
                value[key] = renewed
    elif isinstance(value, tuple):
        for item in value:
            rebind(item, new, seen)
    elif isinstance(value, types.FunctionType):
        _rebind_function(value, new, seen)
    elif isinstance(value, types.MethodType):
        _rebind_method(value, new, seen)
    elif isinstance(value, functools.partial):
        arguments = tuple(_renewed(item, new, seen) for item in value.args)
        rebind(value.keywords, new, seen)
        rebind(value.func, new, seen)
        # the one way to change the arguments of a partial that others hold as well
        value.__setstate__((value.func, arguments, value.keywords, value.__dict__))  # type: ignore[attr-defined]
    elif hasattr(value, "step") and hasattr(value, "__dict__"):  # a scheduler, whatever its class
        rebind(value.__dict__, new, seen)
    elif callable(value):
        _rebind_attributes(value, new)


def _renewed(value: Any, new: Mapping[int, Optimizer], seen: set[int]) -> Any:
    """Return the new optimizer for an old one, a tuple with the new ones, or the value itself, rebound."""
    if isinstance(value, Optimizer):
        return new.get(id(value), value)
    if type(value) is tuple and any(isinstance(item, Optimizer) and id(item) in new for item in value):
        return tuple(_renewed(item, new, seen) for item in value)
    rebind(value, new, seen)
    return value


def _rebind_function(function: types.FunctionType, new: Mapping[int, Optimizer], seen: set[int]) -> None:
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # a variable that was never set
            continue
        renewed = _renewed(held, new, seen)
        if renewed is not held:
            cell.cell_contents = renewed
    if function.__defaults__:
        function.__defaults__ = tuple(_renewed(item, new, seen) for item in function.__defaults__)
    if function.__kwdefaults__:
        rebind(function.__kwdefaults__, new, seen)


def _rebind_method(method: types.MethodType, new: Mapping[int, Optimizer], seen: set[int]) -> None:
    owner = method.__self__
    if isinstance(owner, Optimizer) and id(owner) in new:
        raise ConfigurationError(
            f"LowMemoryOptimizer: a schedule calls {type(owner).__name__}.{method.__name__} of the optimizer that is "
            f"replaced by {type(new[id(owner)]).__name__}. Write the schedule as a function of its own."
        )
    rebind(method.__func__, new, seen)
    _rebind_attributes(owner, new)


def _rebind_attributes(owner: Any, new: Mapping[int, Optimizer]) -> None:
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if isinstance(value, Optimizer) and id(value) in new:
            setattr(owner, name, new[id(value)])
