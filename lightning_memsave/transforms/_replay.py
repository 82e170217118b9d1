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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_memsave.errors import ConfigurationError

__all__ = ["ForwardState"]

_HOOKS = tuple(key for key in nn.Module().__dict__ if key.startswith("_forward_"))
_STANDARD = frozenset(nn.Module().__dict__) - {"training"}
_MISSING = object()
# Tensors up to this size are copied at every forward, since they may change; larger ones once they were seen to.
_SMALL = 2**16


class ForwardState:
    """What one forward of a block found on its modules.

    Args:
        block: The block whose forward is about to run.
        learned: Names of large tensors that were seen to change; filled here, shared by all forwards of the block.
        first: This is the block's first forward: compare values too, since some kernels change a tensor unseen.

    """

    def __init__(self, block: nn.Module, learned: set[str], *, first: bool) -> None:
        self._learned = learned
        self._first = first
        self._random = _random_states()
        self._modules = list(block.named_modules())
        self._attributes = [_attributes(module) for _, module in self._modules]
        self._hooks = [_hooks(module) for _, module in self._modules]
        self._buffers = [dict(module._buffers) for _, module in self._modules]
        self._flags = [
            {key: p.requires_grad for key, p in module._parameters.items() if p is not None}
            for _, module in self._modules
        ]
        self._copies: dict[tuple[int, str], tuple[Tensor, Tensor, int]] = {}
        for index, key, tensor in self._tensors():
            kept = first or tensor.numel() <= _SMALL or self._name(index, key) in learned
            copy = tensor.detach().clone() if kept else tensor
            self._copies[index, key] = (tensor, copy, tensor._version)

    def settle(self, name: str) -> None:
        """Drop what the forward did not change.

        Args:
            name: Qualified name of the block, for the message.

        Raises:
            ConfigurationError: If a large tensor changed that never changed before, so that no copy was made.

        """
        if _same_random_states(self._random):
            self._random = ()
        for (index, key), (tensor, copy, version) in list(self._copies.items()):
            path = self._name(index, key)
            changed = tensor._version != version or path in self._learned
            if not changed and self._first and tensor.numel() <= _SMALL and not tensor.is_meta:
                changed = not torch.equal(copy, tensor)
            if not changed:
                del self._copies[index, key]
            elif copy is tensor:
                self._learned.add(path)
                raise ConfigurationError(
                    f"ActivationCheckpointing: {name}.{path} ({tensor.numel():,} values) was changed in place by a "
                    "forward for the first time after the block's first call, and recomputing needs its old value. "
                    f"Call the block once with the change before training, or leave {name!r} out with modules=[...]."
                )
            else:
                self._learned.add(path)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Put the state back to what the forward found, and on exit to what it is now."""
        undo: list[tuple[Any, Any, Any]] = []
        flags: list[tuple[nn.Parameter, bool]] = []
        random_now = _random_states() if self._random else ()
        try:
            for index, (_, module) in enumerate(self._modules):
                _install(module.__dict__, self._attributes[index], _attributes(module), undo)
                _install(module.__dict__, self._hooks[index], _hooks(module), undo)
                _install(module._buffers, self._buffers[index], dict(module._buffers), undo)
                for key, tensor in self._fresh(index, module):
                    _set(module._buffers if key in module._buffers else module.__dict__, key, tensor, undo)
                for key, flag in self._flags[index].items():
                    parameter = module._parameters.get(key)
                    if parameter is not None and parameter.requires_grad != flag:
                        flags.append((parameter, parameter.requires_grad))
                        parameter.requires_grad_(flag)
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
            _set_random_states(random_now)

    def _fresh(self, index: int, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors to write on during the replay, so that nothing is updated twice."""
        for (at, key), (_, copy, _) in self._copies.items():
            if at == index:
                yield key, copy.clone()
        if _updates_statistics(module):
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    yield key, tensor.clone()

    def _tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        for index, (_, module) in enumerate(self._modules):
            if _updates_statistics(module):
                continue  # Their outputs do not depend on the statistics: a copy made for the replay will do.
            for values in (self._buffers[index], self._attributes[index]):
                for key, value in values.items():
                    if isinstance(value, Tensor) and not value.is_inference() and not value.requires_grad:
                        yield index, key, value

    def _name(self, index: int, key: str) -> str:
        name = self._modules[index][0]
        return f"{name}.{key}" if name else key


def _updates_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if key not in _STANDARD}


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {key: OrderedDict(module.__dict__[key]) for key in _HOOKS if key in module.__dict__}


def _install(container: Any, before: dict[str, Any], now: dict[str, Any], undo: list[tuple[Any, Any, Any]]) -> None:
    for key in before.keys() | now.keys():
        value, current = before.get(key, _MISSING), now.get(key, _MISSING)
        same = value == current if isinstance(value, OrderedDict) else value is current
        if not same:
            _set(container, key, value, undo)


def _set(container: Any, key: str, value: Any, undo: list[tuple[Any, Any, Any]]) -> None:
    undo.append((container, key, container.get(key, _MISSING)))
    if value is _MISSING:
        container.pop(key, None)
    else:
        container[key] = value


# -- the random states that torch does not replay ----------------------------------------------------
def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (random.getstate(), numpy.random.get_state() if numpy is not None else None)


def _same_random_states(states: tuple[Any, ...]) -> bool:
    python, numpy = states
    now_python, now_numpy = _random_states()
    if numpy is None or now_numpy is None:
        return bool(python == now_python)
    return bool(python == now_python and numpy[2] == now_numpy[2] and (numpy[1] == now_numpy[1]).all())


def _set_random_states(states: tuple[Any, ...]) -> None:
    if not states:
        return
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
