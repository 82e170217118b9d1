"""Run a forward a second time as if it were the first: the state it reads beside its arguments, kept and put back.

``torch.utils.checkpoint`` replays the arguments, the torch random state and autocast. A block also reads, and may
change, what hangs on its modules: batch-norm statistics, the hidden state of a stateful RNN, spectral-norm vectors,
hooks an outer model installs for one forward, ``training`` and ``requires_grad`` flags, and the random states of
Python and NumPy. A replay sees all of it as the forward found it and leaves all of it as it is.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_memsave.errors import ConfigurationError

__all__ = ["ForwardHabits", "ForwardState"]

_HOOKS = tuple(key for key in nn.Module().__dict__ if key.startswith("_forward_"))
# Structure, not state: never put back (a sharded strategy swaps parameters between forward and backward).
_STRUCTURE = frozenset(nn.Module().__dict__) - {"training"}
_MISSING = object()
# Tensors up to this size are copied at every forward, since they may change; larger ones once they were seen to.
_SMALL = 2**16


@dataclass
class ForwardHabits:
    """What the forwards of one block were seen to do; shared by all of them.

    Args:
        calls: How many there were.
        writes: Names of the tensors they change.
        draws: ``training`` flag -> whether they draw Python or NumPy random numbers.

    """

    calls: int = 0
    writes: set[str] = field(default_factory=set)
    draws: dict[bool, bool] = field(default_factory=dict)


class ForwardState:
    """What one forward of a block finds on its modules.

    Args:
        block: The block whose forward is about to run.
        habits: Those of the block.

    """

    def __init__(self, block: nn.Module, habits: ForwardHabits) -> None:
        self._block, self._habits, self._training = block, habits, block.training
        self._random = _random_states() if habits.draws.get(block.training, True) else ()
        self._modules = list(block.modules())
        self._attributes = [dict(module.__dict__) for module in self._modules]
        self._hooks = [{k: OrderedDict(h) for k in _HOOKS if (h := m.__dict__.get(k))} for m in self._modules]
        self._buffers = [dict(module._buffers) for module in self._modules]
        self._flags = [[(k, p.requires_grad) for k, p in m._parameters.items() if p is not None] for m in self._modules]
        self._copies: list[tuple[int, str, Tensor, Tensor, int]] = []
        for index, key, tensor in self._tensors():
            kept = not habits.calls or tensor.numel() <= _SMALL or self._name(index, key) in habits.writes
            self._copies.append((index, key, tensor, tensor.detach().clone() if kept else tensor, tensor._version))

    def settle(self, name: str) -> None:
        """Drop what the forward did not change.

        Args:
            name: Qualified name of the block, for the message.

        Raises:
            ConfigurationError: If a large tensor changed that never changed before, so that no copy was made.

        """
        drew = bool(self._random) and not _equal_random_states(self._random, _random_states())
        self._habits.draws[self._training] = self._habits.draws.get(self._training, False) or drew
        if not drew:
            self._random = ()
        changed = [entry for entry in self._copies if self._changed(*entry)]
        self._copies = changed
        self._habits.calls += 1
        for index, key, tensor, copy, _ in changed:
            path = self._name(index, key)
            self._habits.writes.add(path)
            if copy is tensor:
                raise ConfigurationError(
                    f"ActivationCheckpointing: {name}.{path} ({tensor.numel():,} values) was changed in place for the "
                    "first time after the block's first forward, and recomputing needs its old value. "
                    f"Leave {name!r} out: name the other blocks with modules=[...]."
                )

    def _changed(self, index: int, key: str, tensor: Tensor, copy: Tensor, version: int) -> bool:
        if tensor._version != version or (self._habits.writes and self._name(index, key) in self._habits.writes):
            return True
        # Some kernels write without saying so; compare once.
        return not self._habits.calls and tensor.numel() <= _SMALL and not _equal(copy, tensor)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Put the state back to what the forward found, and on exit to what it is now."""
        undo: list[tuple[Any, Any, Any]] = []
        flags: list[tuple[nn.Parameter, bool]] = []
        now = _random_states() if self._random else ()
        try:
            for index, module in enumerate(self._modules):
                self._put_back(index, module, undo)
                for key, flag in self._flags[index]:
                    parameter = module._parameters.get(key)
                    if parameter is not None and parameter.requires_grad != flag:
                        flags.append((parameter, parameter.requires_grad))
                        parameter.requires_grad_(flag)
            for index, key, _, copy, _ in self._copies:
                module = self._modules[index]
                _set(module._buffers if key in module._buffers else module.__dict__, key, copy.clone(), undo)
            _set_random_states(self._random)
            yield
        finally:
            for container, key, value in reversed(undo):
                if value is _MISSING:
                    container.pop(key, None)
                else:
                    container[key] = value
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            _set_random_states(now)

    def _put_back(self, index: int, module: nn.Module, undo: list[tuple[Any, Any, Any]]) -> None:
        _install(module.__dict__, self._attributes[index], undo)
        _install(module._buffers, self._buffers[index], undo)
        for key in _HOOKS:
            before, current = self._hooks[index].get(key), module.__dict__.get(key)
            if (before or current) and before != current:
                _set(module.__dict__, key, OrderedDict(before or ()), undo)
        if _updates_statistics(module):
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    _set(module._buffers, key, tensor.clone(), undo)

    def _tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield the tensors a forward may write on."""
        for index, module in enumerate(self._modules):
            if _updates_statistics(module):
                continue  # Its output does not depend on the statistics: a copy made for the replay will do.
            for values in (self._buffers[index], self._attributes[index]):
                for key, value in values.items():
                    if isinstance(value, Tensor) and not value.is_inference() and not value.requires_grad:
                        yield index, key, value

    def _name(self, index: int, key: str) -> str:
        name = next(name for name, module in self._block.named_modules() if module is self._modules[index])
        return f"{name}.{key}" if name else key


def _updates_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


def _install(container: Any, before: dict[str, Any], undo: list[tuple[Any, Any, Any]]) -> None:
    for key, value in before.items():
        if container.get(key, _MISSING) is not value and key not in _STRUCTURE:
            _set(container, key, value, undo)
    if len(container) > len(before):
        for key in [key for key in container if key not in before]:
            _set(container, key, _MISSING, undo)


def _set(container: Any, key: str, value: Any, undo: list[tuple[Any, Any, Any]]) -> None:
    undo.append((container, key, container.get(key, _MISSING)))
    if value is _MISSING:
        container.pop(key, None)
    else:
        container[key] = value


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.is_meta or first.is_sparse:
        return True
    return bool(((first == second) | ((first != first) & (second != second))).all())


# -- the random states that torch does not replay ----------------------------------------------------------------------
def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (random.getstate(), numpy.random.get_state() if numpy is not None else None)


def _equal_random_states(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    if first[0] != second[0]:
        return False
    if first[1] is None or second[1] is None:
        return first[1] is second[1]
    return bool(first[1][2:] == second[1][2:] and (first[1][1] == second[1][1]).all())


def _set_random_states(states: tuple[Any, ...]) -> None:
    if not states:
        return
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
