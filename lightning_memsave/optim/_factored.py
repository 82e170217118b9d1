"""A second moment kept as one vector of row means and one of column means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim.per_parameter import block_values, compute_dtype, flat_blocks

__all__ = ["SecondMoment", "factored_state", "factored_state_bytes", "mean_square", "second_moment"]

Index = Any  # of one block of a tensor that was given to shaped()


def factored_state(p: Tensor, device: torch.device, name: str = "exp_avg_sq") -> dict[str, Tensor]:
    """Return the zeros of one second moment: rows and columns of a matrix, every value of a vector."""
    dtype = compute_dtype(p)
    if p.ndim < 2:
        return {name: torch.zeros(p.shape, dtype=dtype, device=device)}
    return {
        f"{name}_row": torch.zeros(p.shape[:-1], dtype=dtype, device=device),
        f"{name}_col": torch.zeros((*p.shape[:-2], p.shape[-1]), dtype=dtype, device=device),
    }


def factored_state_bytes(p: Tensor) -> int:
    """Return ``4 * (rows + columns)`` a matrix, ``4 * numel`` for a vector; twice that for fp64 parameters.

    Example:
        >>> factored_state_bytes(torch.zeros(3, 10, 20))
        360

    """
    itemsize = compute_dtype(p).itemsize
    if p.ndim < 2:
        return p.numel() * itemsize
    return (p.numel() // max(p.shape[-1], 1) + p.numel() // max(p.shape[-2], 1)) * itemsize


class SecondMoment:
    """The second moment of a vector, every value of it; the base of the factored one.

    Args:
        p: The contiguous parameter.
        state: Holds the moment under ``name``.
        name: Of the moment.

    """

    def __init__(self, p: Tensor, state: Mapping[str, Any], name: str = "exp_avg_sq") -> None:
        self._p, self._state, self._name = p, state, name

    def shaped(self, x: Tensor) -> Tensor:
        """Return a view of a contiguous tensor of the parameter's shape that the indices of ``blocks`` fit."""
        return x.view(-1)

    def blocks(self) -> Iterator[Index]:
        """Yield indices that cover the tensor."""
        yield from flat_blocks(self._p)

    def add(self, beta: float, squares: Callable[[Index], Tensor]) -> None:
        """Move the average towards ``squares(index)``, which is made block by block."""
        average = self._state[self._name].view(-1)
        for index in self.blocks():
            average[index].mul_(beta).add_(squares(index), alpha=1 - beta)

    def normalized(self, x: Tensor, index: Index) -> Tensor:
        """Return a block of values over the root of the moment; ``add`` comes first."""
        average: Tensor = self._state[self._name]
        return x * average.view(-1)[index].rsqrt()


class _Factored(SecondMoment):
    """The second moment of one or more matrices: ``(matrices, rows)`` and ``(matrices, columns)`` means."""

    def __init__(self, p: Tensor, state: Mapping[str, Any], name: str = "exp_avg_sq") -> None:
        super().__init__(p, state, name)
        self._rows, self._columns = p.shape[-2], p.shape[-1]
        self._row = state[f"{name}_row"].view(-1, self._rows)
        self._col = state[f"{name}_col"].view(-1, self._columns)
        self._scales: tuple[Tensor, Tensor] | None = None

    def shaped(self, x: Tensor) -> Tensor:
        return x.view(-1, self._rows, self._columns)

    def blocks(self) -> Iterator[Index]:
        """Yield index pairs over ``(matrices, rows)``: several small matrices, or some rows of a large one."""
        count, size, limit = self._row.shape[0], self._rows * self._columns, block_values(self._p)
        if size <= limit:
            for first in range(0, count, limit // size):
                yield slice(first, first + limit // size), slice(None)
            return
        step = max(1, limit // self._columns)
        for index in range(count):
            for first in range(0, self._rows, step):
                yield slice(index, index + 1), slice(first, first + step)

    def add(self, beta: float, squares: Callable[[Index], Tensor]) -> None:
        self._row.mul_(beta)
        self._col.mul_(beta)
        for index in self.blocks():
            part = squares(index)
            self._row[index].add_(part.mean(dim=-1), alpha=1 - beta)
            self._col[index[0]].add_(part.sum(dim=-2), alpha=(1 - beta) / self._rows)
        rows = self._row / self._row.mean(dim=-1, keepdim=True)
        self._scales = rows.rsqrt_().unsqueeze(-1), self._col.rsqrt().unsqueeze(-2)

    def normalized(self, x: Tensor, index: Index) -> Tensor:
        assert self._scales is not None, "add() comes first"
        row, col = self._scales
        return (x * row[index]).mul_(col[index[0]])


def second_moment(p: Tensor, state: Mapping[str, Any], name: str = "exp_avg_sq") -> SecondMoment:
    """Return the second moment that ``factored_state`` made: factored for matrices, whole for vectors."""
    return (SecondMoment if p.ndim < 2 else _Factored)(p, state, name)


def mean_square(parts: Iterable[Tensor], numel: int) -> Tensor:
    """Return the mean of the squares of ``numel`` values that come in parts, without waiting for the device."""
    total: Tensor | None = None
    for part in parts:
        square = part.square().sum()
        total = square if total is None else total + square
    assert total is not None, "a tensor without values is not stepped"
    return total / numel
