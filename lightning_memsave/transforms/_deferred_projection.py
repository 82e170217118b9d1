"""Output heads, and one pass over one: the logits of a chunk of rows, and the gradients that come back to it."""

# c = rows of a chunk, D = hidden size, V = vocabulary; z = logits, dz = their gradient

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Head", "LinearHead", "ModuleHead", "Products", "autocast_as", "wide_dtype"]

# Values of a 16-bit weight gradient that are added to the fp32 sum at a time.
_BLOCK_VALUES = 1 << 24


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of softmax and sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_as(device: torch.device, dtype: torch.dtype | None, *, cache: bool = False) -> AbstractContextManager[Any]:
    """Return autocast to a dtype, or none for ``None``, on one device."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    if dtype is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype, cache_enabled=cache)


@dataclass(frozen=True)
class Products:
    """How the products of a head are computed.

    Args:
        dtype: Their dtype.
        device: Where the hidden states are.
        autocast_dtype: What autocast was set to where the head was called, or ``None``.

    """

    dtype: torch.dtype
    device: torch.device
    autocast_dtype: torch.dtype | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of softmax and sums."""
        return wide_dtype(self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast state of the call, also in backward; weights are cast once for all chunks."""
        # A cast that was cached without gradients would be served to a forward that needs them.
        return autocast_as(self.device, self.autocast_dtype, cache=torch.is_grad_enabled())

    def without_autocast(self) -> AbstractContextManager[Any]:
        """Return a state in which nothing is cast behind our back."""
        return autocast_as(self.device, None)


@dataclass
class LinearHead:
    """``hidden @ weight.T + bias``, with the products written out here.

    Args:
        weight: ``(V, D)`` in any floating dtype, cast once per pass; ``None`` if it has to be unpacked.
        bias: ``(V,)`` or ``None``.
        unpack: Makes the ``(V, D)`` values of a quantized weight in a dtype.
        classes: V.

    """

    weight: Tensor | None
    bias: Tensor | None
    classes: int
    unpack: Callable[[torch.dtype], Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd has to know about."""
        return self.weight, self.bias

    def open(
        self, products: Products, tensors: Sequence[Tensor | None], chunk: int, needs: Sequence[bool]
    ) -> _LinearRun:
        """Begin a pass."""
        weight, bias = tensors
        if weight is None:
            assert self.unpack is not None
            weight = self.unpack(products.dtype)
        return _LinearRun(weight, bias, products.dtype, chunk, needs)


@dataclass
class ModuleHead:
    """A head that is called as it is, chunk by chunk: adapters, layers with a computed weight.

    Args:
        function: ``(c, D)`` hidden states to ``(c, V)`` logits; must give a row the same logits in every call.
        parameters: Its trainable parameters.
        classes: V.

    """

    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    classes: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd has to know about."""
        return tuple(self.parameters)

    def open(
        self, products: Products, tensors: Sequence[Tensor | None], chunk: int, needs: Sequence[bool]
    ) -> _ModuleRun:
        """Begin a pass."""
        return _ModuleRun(self.function, tensors, products, needs)


Head = LinearHead | ModuleHead


class _LinearRun:
    """One pass over a linear head: the cast weight, one buffer of logits, the sums of the gradients."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk: int, needs: Sequence[bool]
    ) -> None:
        self.dtype, self.wide = dtype, wide_dtype(dtype)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.buffer = torch.empty(chunk, weight.shape[0], dtype=self.wide, device=weight.device)
        self.needs_hidden = needs[0]
        self.sums = [
            torch.zeros(tensor.shape, dtype=self.wide, device=tensor.device) if tensor is not None and need else None
            for tensor, need in zip((weight, bias), needs[1:])
        ]

    def logits(self, rows: Tensor) -> Tensor:
        """Return ``(c, V)`` in the wide dtype; valid until the next call."""
        out = self.buffer[: rows.shape[0]]
        if self.dtype != self.wide:
            return out.copy_(F.linear(rows, self.weight, self.bias))
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=out)
        return torch.addmm(self.bias, rows, self.weight.t(), out=out)

    def gradients(self, rows: Tensor, dz: Tensor) -> Tensor | None:
        """Add to the parameters' gradients and return that of the rows, in the compute dtype."""
        narrow = dz.to(self.dtype)
        weight_sum, bias_sum = self.sums
        if weight_sum is not None:
            self._add_weight(weight_sum, narrow, rows)
        if bias_sum is not None:
            bias_sum.add_(dz.sum(dim=0))
        return narrow @ self.weight if self.needs_hidden else None

    def close(self) -> list[Tensor | None]:
        """Give the sums away, and let go of the buffer and the cast weight."""
        del self.buffer, self.weight, self.bias
        sums, self.sums = self.sums, []
        return sums

    def _add_weight(self, total: Tensor, dz: Tensor, rows: Tensor) -> None:
        if self.dtype == self.wide:
            total.addmm_(dz.t(), rows)
            return
        # A 16-bit product is rounded once and added in fp32, in blocks, so that no second matrix of this size is made.
        block = max(1, _BLOCK_VALUES // rows.shape[1])
        for start in range(0, total.shape[0], block):
            total[start : start + block].add_(dz[:, start : start + block].t() @ rows)


class _ModuleRun:
    """One pass over a head that is called as it is; its gradients come from autograd, chunk by chunk."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        tensors: Sequence[Tensor | None],
        products: Products,
        needs: Sequence[bool],
    ) -> None:
        self.function, self.products = function, products
        self.needs_hidden = needs[0]
        self.parameters = [tensor for tensor, need in zip(tensors, needs[1:]) if need and tensor is not None]
        self.wide = wide_dtype(products.dtype)
        sums = iter([torch.zeros(p.shape, dtype=wide_dtype(p.dtype), device=p.device) for p in self.parameters])
        self.sums: list[Tensor | None] = [next(sums) if need else None for need in needs[1:]]
        self.graph: tuple[Tensor, Tensor] | None = None

    def logits(self, rows: Tensor) -> Tensor:
        """Return ``(c, V)`` in the wide dtype."""
        needs_graph = self.needs_hidden or bool(self.parameters)
        with torch.set_grad_enabled(needs_graph), self.products.autocast():
            leaf = rows.detach().requires_grad_(self.needs_hidden)
            z = self.function(leaf)
        self.graph = (leaf, z) if needs_graph else None
        return z.detach().to(self.wide, copy=True)

    def gradients(self, rows: Tensor, dz: Tensor) -> Tensor | None:
        """Add to the parameters' gradients and return that of the rows."""
        assert self.graph is not None
        (leaf, z), self.graph = self.graph, None
        if not z.requires_grad:  # adapters that were not in use
            return torch.zeros_like(leaf) if self.needs_hidden else None
        inputs = [*([leaf] if self.needs_hidden else []), *self.parameters]
        found = list(torch.autograd.grad(z, inputs, dz.to(z.dtype), allow_unused=True))
        of_rows = found.pop(0) if self.needs_hidden else None
        for total, gradient in zip([s for s in self.sums if s is not None], found):
            if gradient is not None:
                total.add_(gradient)
        return of_rows

    def close(self) -> list[Tensor | None]:
        """Give the sums away."""
        sums, self.sums = self.sums, []
        return sums
