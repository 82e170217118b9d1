"""Products of a gradient with a thin matrix, in row blocks, whichever its longer side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_memsave.optim._adamw_rule import adamw_state_bytes
from lightning_memsave.optim.per_parameter import block_values, compute_dtype

__all__ = ["LowRankMatrix", "is_low_rank", "low_rank_state_bytes", "matrix_shape"]


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """Return rows and columns of a tensor of at least two dimensions, all but the first one flattened."""
    return p.shape[0], p.numel() // max(p.shape[0], 1)


def is_low_rank(p: Tensor, rank: int, by_adamw: bool) -> bool:
    """Return whether the moments of ``p`` are kept in a projection: a matrix whose shorter side is above ``rank``."""
    return not by_adamw and p.ndim >= 2 and min(matrix_shape(p)) > rank


def low_rank_state_bytes(p: Tensor, rank: int, by_adamw: bool, *, stores_projection: bool) -> int:
    """Return ``8 * rank * longer`` and for a projection ``4 * rank * shorter``; ``8 * numel`` for what AdamW steps.

    Without a stored projection there is one more value a matrix: the norm of its last step.
    """
    if not is_low_rank(p, rank, by_adamw):
        return adamw_state_bytes(p)
    values = 2 * rank * max(matrix_shape(p)) + (rank * min(matrix_shape(p)) if stores_projection else 1)
    return values * compute_dtype(p).itemsize


class LowRankMatrix:
    """A matrix ``x`` and its products with a thin basis over its shorter side.

    The projection of ``x`` is ``(longer, rank)``, whichever side is longer; no transposed or fp32 copy of ``x`` is
    made, only of some rows.

    Args:
        x: Contiguous, two or more dimensions.

    """

    def __init__(self, x: Tensor) -> None:
        self.x = x.view(matrix_shape(x))
        self.tall = self.x.shape[0] >= self.x.shape[1]
        self.longer, self.shorter = max(self.x.shape), min(self.x.shape)
        self._dtype = compute_dtype(x)

    def row_blocks(self) -> Iterator[slice]:
        """Yield slices over the rows of ``x``."""
        step = max(1, block_values(self.x) // self.x.shape[1])
        for start in range(0, self.x.shape[0], step):
            yield slice(start, start + step)

    def rows(self, block: slice) -> Tensor:
        """Return some rows in the dtype of the arithmetic."""
        return self.x[block].to(self._dtype)

    def project(self, basis: Tensor) -> Tensor:
        """Return ``x`` times ``basis`` (``(shorter, rank)``), or its transpose times it where the columns are more."""
        out = torch.zeros((self.longer, basis.shape[1]), dtype=self._dtype, device=self.x.device)
        for block in self.row_blocks():
            if self.tall:
                torch.matmul(self.rows(block), basis, out=out[block])
            else:
                out.addmm_(self.rows(block).T, basis[block])
        return out

    def back(self, low: Tensor, basis: Tensor, block: slice) -> Tensor:
        """Return some rows of the matrix whose projection is ``low``."""
        return low[block] @ basis.T if self.tall else basis[block] @ low.T

    def gram(self) -> Tensor:
        """Return the ``(shorter, shorter)`` products of the vectors of the shorter side."""
        out = torch.zeros((self.shorter, self.shorter), dtype=self._dtype, device=self.x.device)
        if self.tall:
            for block in self.row_blocks():
                rows = self.rows(block)
                out.addmm_(rows.T, rows)
            return out
        step = max(1, block_values(self.x) // self.x.shape[0])
        for start in range(0, self.x.shape[1], step):
            columns = self.x[:, start : start + step].to(self._dtype)
            out.addmm_(columns, columns.T)
        return out
