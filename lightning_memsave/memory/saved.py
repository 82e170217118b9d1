"""Bytes that autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsave.memory._reach import storages, tensors_in

__all__ = ["SavedActivations", "record_saved_activations", "saved_activation_bytes"]


class SavedActivations:
    """What a forward saved for backward: distinct storages, parameters and buffers left out."""

    def __init__(self, excluded: set[int]) -> None:
        self._excluded = excluded
        self._kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their identity unique

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct storages."""
        return sum(storage.nbytes() for storage in self._kept.values())

    @property
    def num_storages(self) -> int:
        """How many distinct storages."""
        return len(self._kept)

    def add(self, tensor: Tensor) -> Tensor:
        """Count one saved tensor; it is returned as it is."""
        for storage, _ in storages(tensor):
            if storage._cdata not in self._excluded and storage.nbytes():
                self._kept[storage._cdata] = storage
        return tensor


@contextmanager
def record_saved_activations(module: nn.Module) -> Iterator[SavedActivations]:
    """Count what autograd saves inside of the block.

    Parameters and buffers of ``module``, and what quantized weights carry, are not activations. A region with its own
    saved-tensor hooks (non-reentrant checkpointing, offloading) shows what it passes on to autograd outside of it.
    """
    excluded: set[int] = set()
    for tensor in [*module.parameters(), *module.buffers()]:
        for held in (tensor, *tensors_in(list(tensor.__dict__.values()))):
            excluded.update(storage._cdata for storage, _ in storages(held))
    found = SavedActivations(excluded)
    with torch.autograd.graph.saved_tensors_hooks(found.add, lambda tensor: tensor):
        yield found


def saved_activation_bytes(module: nn.Module, forward: Callable[..., Any] | None = None, *args: Any) -> int:
    """Run a forward and return the bytes it saved for backward.

    Counted are distinct storages, so a tensor that two operations save counts once; parameters and buffers do not
    count, the input does if an operation saves it.

    Args:
        module: The model.
        forward: What to call with ``args``, e.g. a ``training_step``; ``None`` is the module itself.
        *args: Passed to ``forward``.

    Example:
        >>> layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> saved_activation_bytes(layer, None, torch.ones(2, 4))  # the input, 2 * 4 * 4, and ReLU's result, 2 * 8 * 4
        96

    """
    with record_saved_activations(module) as found:
        result = (forward or module)(*args)
    num_bytes = found.num_bytes
    del result
    return num_bytes
