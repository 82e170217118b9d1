"""Find keys and values whose heads were repeated for grouped-query attention, and what they were repeated from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["RepeatedHeads"]


class RepeatedHeads:
    """Watch ``expand`` + ``reshape`` and ``repeat_interleave``, the two ways in which heads are repeated.

    What is found is exact: the tensor is the very one that was made from its source, nothing was written to either
    since, and gradients flow to both alike.
    """

    def __init__(self) -> None:
        self._expanded = WeakIdKeyDictionary()  # 5-D view -> (what was expanded, the dimension of the copies)
        self._repeated = (
            WeakIdKeyDictionary()
        )  # 4-D -> (source, dimension to squeeze, dimension of the heads, versions)
        self.watched: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
            Tensor.expand: self._expand,
            Tensor.reshape: self._reshape,
            torch.reshape: self._reshape,
            Tensor.flatten: self._reshape,
            torch.flatten: self._reshape,
            Tensor.repeat_interleave: self._interleave,
            torch.repeat_interleave: self._interleave,
        }

    def source(self, tensor: Tensor) -> Tensor | None:
        """Return the ``(B, key heads, S, D)`` tensor whose heads were repeated to make ``tensor``, or ``None``."""
        if tensor.is_inference():
            return None
        made, turned = tensor, False
        if tensor not in self._repeated and tensor._base is not None and tensor._base.ndim == 4:
            made, turned = tensor._base, True
            swapped = made.transpose(1, 2)
            if swapped.shape != tensor.shape or swapped.stride() != tensor.stride():
                return None
        if made not in self._repeated:
            return None
        source, copies, heads, versions = self._repeated[made]
        if heads != (2 if turned else 1) or versions != (source._version, made._version):
            return None
        if source.requires_grad != tensor.requires_grad or any(_is_watched(t) for t in (tensor, made)):
            return None
        if copies is not None:
            source = source.squeeze(copies)
        return source.transpose(1, 2) if turned else source  # type: ignore[no-any-return]

    # -- what is watched ----------------------------------------------------------------------------------------------
    def _expand(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        source = args[0]
        if _plain(source, 5) and _plain(out, 5):
            grown = [d for d in range(5) if source.shape[d] != out.shape[d]]
            if len(grown) == 1 and grown[0] in (2, 3):
                self._expanded[out] = (source, grown[0])
        return out

    def _reshape(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        given: Any = args[0] if args else kwargs.get("input")
        if _plain(given, 5) and _plain(out, 4) and given in self._expanded:
            source, copies = self._expanded[given]
            shape = given.shape
            merged = (*shape[: copies - 1], shape[copies - 1] * shape[copies], *shape[copies + 1 :])
            if out.shape == merged and source._version == given._version:
                self._repeated[out] = (source, copies, copies - 1, (source._version, out._version))
        return out

    def _interleave(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        given: Any = args[0] if args else kwargs.get("input")
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        if type(repeats) is int and repeats > 1 and dim is not None and _plain(given, 4) and _plain(out, 4):
            heads = dim % 4
            if heads in (1, 2):
                self._repeated[out] = (given, None, heads, (given._version, out._version))
        return out


def _is_watched(tensor: Tensor) -> bool:
    """Whether somebody wants the gradient of this very tensor."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


def _plain(tensor: Any, ndim: int) -> bool:
    return type(tensor) is Tensor and tensor.ndim == ndim and not tensor.is_inference()
