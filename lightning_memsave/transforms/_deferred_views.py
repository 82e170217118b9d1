"""What deferred logits keep for later: views of the other dimensions, casts, elementwise steps."""

# A rule takes the function's own arguments and returns its result, or NotImplemented where only real values do.

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.transforms._deferred_tasks import Scale, Shift, Step, Tanh
from lightning_memsave.transforms.deferred_logits import DeferredLogits, Lazy, wrap

__all__ = [
    "cast",
    "chunk",
    "detach",
    "dimension",
    "flatten",
    "getitem",
    "index_select",
    "iterate",
    "log_softmax",
    "movedim",
    "narrow",
    "on_device",
    "permute",
    "scaled",
    "shifted",
    "split",
    "squeeze",
    "tanh",
    "to",
    "transpose",
    "type_as",
    "unbind",
    "unsqueeze",
    "view",
    "view_as_shape",
]


def _derive(x: DeferredLogits, replay: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits:
    """Return a deferred tensor like ``x`` but for some attributes; ``replay`` is the operation on real values."""
    old = x._memsave
    kept = {
        name: changes.pop(name, getattr(old, name))
        for name in ("shape", "axis", "dtype", "index", "steps", "normalized", "grad")
    }
    assert not changes, changes
    kept["grad"] = kept["grad"] and torch.is_grad_enabled()
    shape, axis, dtype = (kept.pop(name) for name in ("shape", "axis", "dtype"))
    return wrap(Lazy(old.source, shape, axis, dtype, **kept, parent=x, replay=replay))


def dimension(value: Any, ndim: int) -> int:
    return int(value) % ndim


# -- views of the other dimensions -----------------------------------------------------------------------------------
def _from_index(x: DeferredLogits, index: Tensor, axis: int, replay: Callable[[Tensor], Tensor]) -> DeferredLogits:
    classes = x._memsave.shape[x._memsave.axis]
    shape = (*index.shape[:axis], classes, *index.shape[axis:])
    return _derive(x, replay, index=index, axis=axis, shape=shape)


def getitem(x: DeferredLogits, key: Any) -> Any:
    lazy = x._memsave
    if lazy.axis != len(lazy.shape) - 1:
        return NotImplemented
    keys = list(key) if isinstance(key, tuple) else [key]
    taken = [_consumed(k) for k in keys]
    if None in taken:
        return NotImplemented
    total, ndim = sum(n for n in taken if n), len(lazy.shape)
    dots = [i for i, k in enumerate(keys) if k is Ellipsis]
    if total > ndim or len(dots) > 1:
        return NotImplemented
    full = [slice(None)] * (ndim - total)
    where = dots[0] if dots else len(keys)
    keys[where : where + len(dots)] = full
    last = keys.pop()
    if not (isinstance(last, slice) and last == slice(None)):
        return NotImplemented
    index = lazy.positions()[tuple(keys)]
    return _from_index(x, index, index.ndim, partial(operator.itemgetter(key)))


def _consumed(key: Any) -> int | None:
    """Return how many dimensions one part of an index takes, or ``None`` for what is left to torch."""
    if key is None or key is Ellipsis:
        return 0
    if isinstance(key, bool):
        return None
    if isinstance(key, Tensor) and not isinstance(key, DeferredLogits):
        return key.ndim if key.dtype in (torch.bool, torch.uint8) else 1
    if isinstance(key, (int, slice)):
        return 1
    if isinstance(key, (list, range)) and all(type(k) is int for k in key):
        return 1
    return None


def view_as_shape(x: DeferredLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    lazy = x._memsave
    if not all(isinstance(size, int) for size in shape) or not shape or lazy.axis != len(lazy.shape) - 1:
        return NotImplemented
    known = math.prod(size for size in shape if size != -1)
    wanted = [lazy.shape.numel() // known if size == -1 and known else size for size in shape]
    if wanted[-1] != lazy.shape[-1] or math.prod(wanted) != lazy.shape.numel() or shape.count(-1) > 1:
        return NotImplemented
    index = None if lazy.index is None else lazy.index.reshape(wanted[:-1])
    return _derive(x, lambda z: z.reshape(wanted), index=index, shape=tuple(wanted), axis=len(wanted) - 1)


def view(x: DeferredLogits, *shape: Any, **keywords: Any) -> Any:
    shape = shape or (keywords.pop("shape", None) or keywords.pop("size", None),)
    return NotImplemented if keywords or shape == (None,) else view_as_shape(x, *shape)


def flatten(x: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    shape = x._memsave.shape
    start, end = dimension(start_dim, len(shape)), dimension(end_dim, len(shape))
    if start >= end:
        return x
    return view_as_shape(x, *shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def permute(x: DeferredLogits, *order: Any) -> Any:
    if len(order) == 1 and not isinstance(order[0], int):
        order = tuple(order[0])
    lazy = x._memsave
    ndim = len(lazy.shape)
    order = tuple(dimension(d, ndim) for d in order)
    if sorted(order) != list(range(ndim)):
        return NotImplemented
    lead = [d - (d > lazy.axis) for d in order if d != lazy.axis]
    index = lazy.index if lead == sorted(lead) else lazy.positions().permute(lead)
    shape = tuple(lazy.shape[d] for d in order)
    return _derive(x, lambda z: z.permute(order), index=index, axis=order.index(lazy.axis), shape=shape)


def transpose(x: DeferredLogits, dim0: int, dim1: int) -> Any:
    ndim = len(x._memsave.shape)
    order = list(range(ndim))
    first, second = dimension(dim0, ndim), dimension(dim1, ndim)
    order[first], order[second] = order[second], order[first]
    return permute(x, *order)


def movedim(x: DeferredLogits, source: Any, destination: Any) -> Any:
    if not (isinstance(source, int) and isinstance(destination, int)):
        return NotImplemented
    ndim = len(x._memsave.shape)
    order = list(range(ndim))
    moved = order.pop(dimension(source, ndim))
    order.insert(dimension(destination, ndim), moved)
    return permute(x, *order)


def squeeze(x: DeferredLogits, dim: Any = None) -> Any:
    lazy = x._memsave
    ndim = len(lazy.shape)
    if lazy.shape[lazy.axis] == 1 or not (dim is None or isinstance(dim, int)):
        return NotImplemented
    dims = [d for d in range(ndim) if lazy.shape[d] == 1 and (dim is None or d == dimension(dim, ndim))]
    shape = tuple(size for d, size in enumerate(lazy.shape) if d not in dims)
    axis = lazy.axis - sum(d < lazy.axis for d in dims)
    index = lazy.positions().reshape(shape[:axis] + shape[axis + 1 :])
    return _from_index(x, index, axis, lambda z: z.reshape(shape))


def unsqueeze(x: DeferredLogits, dim: int) -> Any:
    lazy = x._memsave
    where = dimension(dim, len(lazy.shape) + 1)
    axis = lazy.axis + (where <= lazy.axis)
    index = lazy.positions().unsqueeze(where if where <= lazy.axis else where - 1)
    return _from_index(x, index, axis, lambda z: z.unsqueeze(where))


def _pieces(function: Callable[..., Any], x: DeferredLogits, *args: Any, dim: int = 0) -> Any:
    """Split along a dimension that is not the vocabulary."""
    lazy = x._memsave
    along = dimension(dim, len(lazy.shape))
    if along == lazy.axis:
        return NotImplemented
    indices = function(lazy.positions(), *args, dim=along - (along > lazy.axis))
    axis = lazy.axis - (function is torch.unbind and along < lazy.axis)
    made = []
    for number, index in enumerate(indices):
        replay = partial(_piece, function, args, along, number)
        made.append(_from_index(x, index, axis, replay))
    return tuple(made)


def _piece(function: Callable[..., Any], args: Sequence[Any], dim: int, number: int, z: Tensor) -> Tensor:
    return function(z, *args, dim=dim)[number]  # type: ignore[no-any-return]


def split(x: DeferredLogits, split_size_or_sections: Any, dim: int = 0) -> Any:
    return _pieces(torch.split, x, split_size_or_sections, dim=dim)


def chunk(x: DeferredLogits, chunks: int, dim: int = 0) -> Any:
    return _pieces(torch.chunk, x, chunks, dim=dim)


def unbind(x: DeferredLogits, dim: int = 0) -> Any:
    return _pieces(torch.unbind, x, dim=dim)


def iterate(x: DeferredLogits) -> Any:
    parts = unbind(x)
    return parts if parts is NotImplemented else iter(parts)


def narrow(x: DeferredLogits, dim: int, start: Any, length: int) -> Any:
    if not (isinstance(start, int) and start >= 0):
        return NotImplemented
    key = [slice(None)] * len(x._memsave.shape)
    key[dimension(dim, len(key))] = slice(start, start + length)
    return getitem(x, tuple(key))


def index_select(x: DeferredLogits, dim: int, index: Tensor) -> Any:
    key: list[Any] = [slice(None)] * len(x._memsave.shape)
    key[dimension(dim, len(key))] = index
    return getitem(x, tuple(key))


# -- dtypes and elementwise steps ------------------------------------------------------------------------------------
def cast(dtype: torch.dtype, x: DeferredLogits, *args: Any, **keywords: Any) -> Any:
    lazy = x._memsave
    if dtype == lazy.dtype:
        return x
    # The chunks are fp32: fp64 from narrower products, and what is no float, need the values.
    if not dtype.is_floating_point or (dtype == torch.float64) != (lazy.source.products.dtype == torch.float64):
        return NotImplemented
    return _derive(x, lambda z: z.to(dtype), dtype=dtype)


def to(x: DeferredLogits, *args: Any, **keywords: Any) -> Any:
    if keywords.get("copy") or any(value is True for value in args[2:]):
        return NotImplemented
    dtype = x._memsave.dtype
    for value in (*args, *keywords.values()):
        if isinstance(value, Tensor):
            dtype, value = value.dtype, value.device
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool):
            device = torch.device(value)
            here = x._memsave.source.hidden.device
            if device.type != here.type or device.index not in (None, here.index):
                return NotImplemented
    return cast(dtype, x)


def on_device(kind: str, x: DeferredLogits, *args: Any, **keywords: Any) -> Any:
    return x if x._memsave.source.hidden.device.type == kind and not args and not keywords else NotImplemented


def type_as(x: Any, other: Tensor) -> Any:
    return to(x, other) if isinstance(x, DeferredLogits) else NotImplemented


def _step(x: DeferredLogits, step: Step, replay: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Any:
    lazy = x._memsave
    if lazy.normalized:
        return NotImplemented
    return _derive(x, replay, steps=(*lazy.steps, step), dtype=dtype)


def scaled(inverse: bool, x: Any, other: Any, **keywords: Any) -> Any:
    if not isinstance(x, DeferredLogits):
        if inverse:
            return NotImplemented
        x, other = other, x
    if keywords or isinstance(other, DeferredLogits) or not isinstance(x, DeferredLogits):
        return NotImplemented
    if isinstance(other, Tensor):
        if other.ndim or other.requires_grad or not other.is_floating_point():
            return NotImplemented
        other = other.clone()
    elif not isinstance(other, (int, float)) or isinstance(other, bool):
        return NotImplemented
    replay = (lambda z: z / other) if inverse else (lambda z: z * other)
    return _step(x, Scale(other, inverse), replay, x._memsave.dtype)


def tanh(x: DeferredLogits) -> Any:
    return _step(x, Tanh(), torch.tanh, x._memsave.dtype)


def shifted(x: Any, other: Any, **keywords: Any) -> Any:
    if not isinstance(x, DeferredLogits):
        x, other = other, x
    lazy = x._memsave
    fits = isinstance(other, Tensor) and not isinstance(other, DeferredLogits) and other.is_floating_point()
    if keywords or not fits or other.requires_grad or lazy.axis != len(lazy.shape) - 1:
        return NotImplemented
    if not other.ndim or other.shape[-1] != lazy.shape[-1] or other.numel() != other.shape[-1]:
        return NotImplemented
    dtype = torch.promote_types(lazy.dtype, other.dtype)
    if other.ndim > len(lazy.shape) or (dtype == torch.float64) != (lazy.source.products.dtype == torch.float64):
        return NotImplemented
    values = other.clone()
    return _step(x, Shift(values.view(-1)), lambda z: z + values, dtype)


def log_softmax(x: DeferredLogits, dim: Any = None, *args: Any, **keywords: Any) -> Any:
    lazy = x._memsave
    keywords.pop("_stacklevel", None)
    dtype = keywords.pop("dtype", None)
    if dim is None or any(a is not None and not isinstance(a, int) for a in args) or keywords:
        return NotImplemented
    if dimension(dim, len(lazy.shape)) != lazy.axis or lazy.normalized:
        return NotImplemented
    made = x if dtype is None else cast(dtype, x)
    if made is NotImplemented:
        return made
    return _derive(made, lambda z: torch.log_softmax(z, dim), normalized=True)


def detach(x: DeferredLogits) -> Any:
    return _derive(x, torch.detach, grad=False)
