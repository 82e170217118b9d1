"""Find tensors in whatever holds them, and the storages behind a tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_wrapper", "storages", "tensors_in"]

_MAX_VISITED = 100_000  # objects: a batch of Python numbers must not stop a step
_MAX_DEPTH = 12
_LONG = 1000  # elements: a longer list that begins with a number or a text is taken to hold nothing else
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), type, ModuleType, torch.dtype, torch.device)

_wrapper_types: dict[type, bool] = {torch.Tensor: False, nn.Parameter: False}


def is_wrapper(cls: type) -> bool:
    """Return whether tensors of this class hold their bytes in inner tensors (``DTensor``, torchao's)."""
    known = _wrapper_types.get(cls)
    if known is None:
        known = hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__")
        _wrapper_types[cls] = known
    return known


def storages(tensor: Tensor) -> Iterator[tuple[torch.UntypedStorage, Tensor]]:
    """Yield each storage a tensor stands on, with the plain tensor that stands on it.

    Wrapper subclasses are unwrapped and sparse tensors give their indices and values. A tensor without a storage
    (opaque layouts) gives nothing: its bytes cannot be seen from here.
    """
    if is_wrapper(type(tensor)):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            inner = getattr(tensor, name, None)
            if isinstance(inner, Tensor):
                yield from storages(inner)
        return
    if tensor.layout is torch.strided:
        try:
            yield tensor.untyped_storage(), tensor
        except (NotImplementedError, RuntimeError):  # functorch's wrappers and opaque tensors refuse
            return
        return
    for part in _sparse_parts(tensor):
        yield from storages(part)


def _sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()


def tensors_in(value: Any, *, enter: Callable[[Any], bool] | None = None) -> Iterator[Tensor]:
    """Yield the tensors an object holds: pytrees, dataclasses, and objects with tensors in their attributes.

    Modules, optimizers and callables are not entered; an object is visited once.

    Args:
        value: A batch, an optimizer's state, a parameter's ``quant_state`` ...
        enter: Whether to look into the attributes of a custom object; by default any is.

    """
    seen: set[int] = set()
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack and len(seen) < _MAX_VISITED:
        item, depth = stack.pop()
        if isinstance(item, _LEAVES) or id(item) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            stack.extend((inner, depth + 1) for inner in list(item.values()))
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend((inner, depth + 1) for inner in _elements(item))
        elif enter is None or enter(item):
            stack.extend((inner, depth + 1) for inner in _attributes(item))


def _elements(items: Collection[Any]) -> list[Any]:
    """Return the elements last first, as the stack pops from its end; none of a long list of numbers or texts."""
    if len(items) > _LONG and isinstance(next(iter(items)), _LEAVES):
        return []
    return list(items)[::-1]


def _attributes(item: Any) -> list[Any]:
    if isinstance(item, (nn.Module, torch.optim.Optimizer)) or callable(item):
        return []
    values = list(getattr(item, "__dict__", {}).values())
    for cls in type(item).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                values.append(getattr(item, name, None))
    return values
