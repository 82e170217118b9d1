"""Block-wise 8-bit state in a form that does not depend on how a tensor was split.

A scale belongs to 256 values of the *shard* it was made on, so a list of scales means nothing without the split. In a
checkpoint every row of the tensor therefore carries the scales of the blocks it meets and how much of the first of them
lies in earlier rows. A shard with the same blocks takes its scales back bit for bit; any other shard can still read the
values, and quantizes them in blocks of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BlockState", "flat_scales", "recode", "row_scales", "scales_per_row"]

# r = rows, c = columns (values of one row), b = blocks, s = size of a block, k = scales of one row

_PIECE_BLOCKS = 4096  # recoded at a time: the copies in fp32 and int64 stay small
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """The names of one moment that an optimizer keeps as codes with one scale a block.

    Args:
        codes: One uint8 code a value, in the shape of the parameter.
        scales: One fp32 factor a block of ``size`` consecutive values.
        table: The ascending ``(256,)`` values that the codes stand for.
        size: Values a block.

    """

    codes: str
    scales: str
    table: str
    size: int = 256


def scales_per_row(num_columns: int, size: int) -> int:
    """Return how many blocks a row can meet, wherever its first block began.

    Example:
        >>> scales_per_row(512, 256), scales_per_row(576, 256), scales_per_row(1, 256)
        (2, 4, 1)

    """
    if num_columns % size == 0:
        return num_columns // size  # every row then begins a block, in every split by rows
    return (num_columns + size - 2) // size + 1


def row_scales(scales_b: Tensor, num_rows: int, num_columns: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the scales that each row meets, and how far into its first block each row begins.

    Args:
        scales_b: One scale a block of the flattened ``(num_rows, num_columns)`` values.
        num_rows: May be zero, for a rank that holds nothing of the tensor.
        num_columns: Values of a row.
        size: Values a block.

    Returns:
        ``(scales_rk, begin_r1)``: the dtype of ``scales_b``, and int32.

    Example:
        >>> scales, begin = row_scales(torch.tensor([1.0, 2.0]), num_rows=2, num_columns=3, size=4)
        >>> scales.tolist(), begin.tolist()
        ([[1.0, 1.0], [1.0, 2.0]], [[0], [3]])

    """
    device = scales_b.device
    first_r1 = torch.arange(num_rows, device=device, dtype=torch.int64).mul_(num_columns).unsqueeze(1)
    begin_r1 = (first_r1 % size).to(torch.int32)
    width = scales_per_row(num_columns, size)
    if not num_rows:
        return scales_b.new_empty((0, width)), begin_r1
    last_r1 = (first_r1 + num_columns - 1) // size
    block_rk = first_r1 // size + torch.arange(width, device=device, dtype=torch.int64)
    return scales_b[torch.minimum(block_rk, last_r1)], begin_r1


def flat_scales(scales_rk: Tensor, begin_r1: Tensor, num_columns: int, size: int) -> Tensor | None:
    """Return one scale a block again, or ``None`` where the rows were cut into other blocks than this shard's.

    Args:
        scales_rk: From ``row_scales``; only this shard's rows.
        begin_r1: From ``row_scales``; only this shard's rows.
        num_columns: Values of a row.
        size: Values a block.

    """
    num_rows, device = scales_rk.shape[0], scales_rk.device
    first_r = torch.arange(num_rows, device=device, dtype=torch.int64) * num_columns
    if not torch.equal(first_r % size, begin_r1.flatten().to(torch.int64)):
        return None
    starts_b = torch.arange(0, num_rows * num_columns, size, device=device, dtype=torch.int64)
    rows_b = starts_b // max(num_columns, 1)
    return scales_rk[rows_b, starts_b // size - rows_b * num_columns // size]


def recode(
    codes_rc: Tensor,
    scales_rk: Tensor,
    begin_r1: Tensor,
    table: Tensor,
    *,
    size: int,
    first_column: int = 0,
) -> tuple[Tensor, Tensor]:
    """Read values whose blocks are described row by row, and quantize them in blocks of their own.

    Args:
        codes_rc: uint8; c may be a part of the columns that ``scales_rk`` describes.
        scales_rk: From ``row_scales``.
        begin_r1: From ``row_scales``.
        table: Ascending ``(256,)`` fp32.
        size: Values a block.
        first_column: Where the c columns begin in the described row.

    Returns:
        ``(codes_rc, scales_b)`` of the flattened values. Each value moves by at most half a step of the table.

    """
    codes = torch.empty_like(codes_rc).view(-1)
    scales_b = torch.empty(-(-codes.numel() // size), dtype=scales_rk.dtype, device=codes.device)
    middles = (table[1:] + table[:-1]) / 2
    for start in range(0, codes.numel(), _PIECE_BLOCKS * size):
        stop = min(start + _PIECE_BLOCKS * size, codes.numel())
        index = torch.arange(start, stop, device=codes.device, dtype=torch.int64)
        row, column = index // codes_rc.shape[1], index % codes_rc.shape[1] + first_column
        block = (begin_r1.view(-1)[row] + column) // size
        values = table[codes_rc.reshape(-1)[start:stop].to(torch.int64)] * scales_rk[row, block]
        blocks_bs = torch.nn.functional.pad(values, (0, -(stop - start) % size)).view(-1, size)
        largest_b = blocks_bs.abs().amax(1)
        relative = blocks_bs / largest_b.clamp(min=_TINY).unsqueeze(1)
        codes[start:stop] = torch.bucketize(relative, middles).to(torch.uint8).view(-1)[: stop - start]
        scales_b[start // size : -(-stop // size)] = largest_b
    return codes.view(codes_rc.shape), scales_b
