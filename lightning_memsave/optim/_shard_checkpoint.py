"""The optimizer state of sharded parameters on its way into a checkpoint and back.

State in the shape of the shard travels as a DTensor that is placed as its parameter, so that torch can gather it, split
it and split it anew. Block-wise state travels row by row, see ``_shard_blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError
from lightning_memsave.optim._shard_blocks import BlockState, flat_scales, recode, row_scales, scales_per_row

__all__ = ["local_part", "local_state", "sharded_state"]

_PARTS = ("_rows", "_begin")
_NAMES = "state_names"  # in every entry: torch reads from a distributed checkpoint what it looks for, and no more
Entry = dict[str, Any]


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard, or the tensor itself.

    Example:
        >>> p = torch.ones(3)
        >>> local_part(p) is p
        True

    """
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local()
    wait = getattr(local, "wait", None)  # a collective that is still under way
    result: Tensor = local if wait is None else wait()
    return result


@dataclass(frozen=True)
class _Split:
    """Which piece of a tensor this rank holds, seen as a matrix of ``shape[0]`` rows.

    Args:
        rows: Rows of the piece.
        columns: Values of a row of the piece.
        first_row: Of the piece in the whole.
        first_column: The same; ``None`` where the piece's columns are not consecutive in the whole.
        whole_columns: Values of a row of the whole.
        parts: Over how many ranks a row is split.
        widest: Values of a row in the widest piece.
        even: All pieces of a row are of the same width.

    """

    rows: int
    columns: int
    first_row: int
    first_column: int | None
    whole_columns: int
    parts: int = 1
    widest: int = 0
    even: bool = True

    @classmethod
    def of(cls, p: Tensor) -> _Split:
        width = math.prod(p.shape[1:])
        if not isinstance(p, DTensor):
            return cls(p.shape[0] if p.ndim else 1, width, 0, 0, width)
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        cuts = [(axis, dim) for axis, dim in enumerate(_dims(p)) if dim > 0]
        widest = list(p.shape)
        for axis, dim in cuts:
            widest[dim] = -(-widest[dim] // p.device_mesh.size(axis))
        parts = math.prod(p.device_mesh.size(axis) for axis, _ in cuts)
        first_column: int | None = 0
        if any(dim > 1 for _, dim in cuts):
            first_column = None
        elif cuts:
            first_column = offset[1] * math.prod(p.shape[2:])
        columns = math.prod(shape[1:])
        even = math.prod(widest[1:]) * parts == width
        first_row = offset[0] if offset else 0
        return cls(shape[0], columns, first_row, first_column, width, parts, math.prod(widest[1:]), even)

    def width(self, size: int) -> int:
        """Return how many scales a row has, the same on every rank."""
        return scales_per_row(self.widest, size) if self.even else self.widest // size + 2

    def keys(self, block: BlockState) -> tuple[str, str]:
        """Return the names of the scales and the beginnings.

        A row that is split over ranks is described part by part, which no other number of parts can read.
        """
        suffix = f"_x{self.parts}" if self.parts > 1 else ""
        return f"{block.scales}{_PARTS[0]}{suffix}", f"{block.scales}{_PARTS[1]}{suffix}"


def _dims(p: DTensor) -> list[int]:
    """Return the dimension that each axis of the mesh splits, -1 for none."""
    return [getattr(placement, "dim", -1) for placement in p.placements]


# -- into a checkpoint -------------------------------------------------------------------------------------------------
def sharded_state(optimizer: Optimizer, state_dict: dict[str, Any], blocks: Sequence[BlockState]) -> dict[str, Any]:
    """Return a state dict with DTensors for what belongs to a DTensor, in the same order on every rank.

    Args:
        optimizer: The state dict is its own, with a plain tensor for each shard.
        state_dict: Left as it is.
        blocks: The moments that are codes with one scale a block.

    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = state_dict["state"]
    numbers = sorted(key for key in state if isinstance(key, int))
    entries = {key: _sharded_entry(parameters[key], state[key], blocks) for key in numbers}
    return {**state_dict, "state": {**entries, **{k: v for k, v in state.items() if k not in entries}}}


def _sharded_entry(p: Tensor, entry: Entry, blocks: Sequence[BlockState]) -> Entry:
    if not isinstance(p, DTensor):
        return entry
    shape, by_scales = local_part(p).shape, {block.scales: block for block in blocks}
    tables = {block.table for block in blocks}
    sharded: Entry = {_NAMES: " ".join(sorted(entry))}
    for name, value in entry.items():
        if name in by_scales:
            sharded.update(_sharded_scales(p, value, by_scales[name]))
        elif not isinstance(value, Tensor) or value.ndim == 0 or name in tables:
            sharded[name] = value
        elif value.shape == shape:
            sharded[name] = _place(value, p, p.shape, p.placements)
        else:
            raise ConfigurationError(
                f"the optimizer state {name!r} has the shape {tuple(value.shape)} for a shard of {tuple(shape)}, so it "
                "cannot be saved as a part of a sharded tensor. Use another optimizer with this strategy."
            )
    return sharded


def _sharded_scales(p: DTensor, scales_b: Tensor, block: BlockState) -> Entry:
    split = _Split.of(p)
    scales_rk, begin_r1 = row_scales(scales_b, split.rows, split.columns, block.size)
    scales_rk = torch.nn.functional.pad(scales_rk, (0, split.width(block.size) - scales_rk.shape[1]))
    placements = [Shard(1) if dim > 1 else at for dim, at in zip(_dims(p), p.placements, strict=True)]
    return {
        key: _place(value, p, torch.Size((p.shape[0], value.shape[1] * split.parts)), placements)
        for key, value in zip(split.keys(block), (scales_rk, begin_r1), strict=True)
    }


def _place(value: Tensor, p: DTensor, shape: torch.Size, placements: Sequence[Any]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


# -- and back ----------------------------------------------------------------------------------------------------------
def local_state(optimizer: Optimizer, state_dict: Mapping[str, Any], blocks: Sequence[BlockState]) -> dict[str, Any]:
    """Return a state dict with a plain tensor for each shard (or each whole parameter) of this optimizer.

    Args:
        optimizer: Will load the result.
        state_dict: Of a sharded run on any number of ranks, or of an ordinary one.
        blocks: The moments that are codes with one scale a block.

    Raises:
        CheckpointMismatchError: If an entry is not of this optimizer, or its rows were split in a way that cannot be
            read here.

    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    state = dict(state_dict["state"])
    for p, key in zip(parameters, keys, strict=False):  # a wrong number is the optimizer's to refuse
        if key in state:
            entry = _flat(state[key])
            _check_names(optimizer, p, entry, blocks)
            state[key] = _local_entry(p, entry, blocks)
    return {**state_dict, "state": state}


def _flat(entry: Mapping[str, Any]) -> Entry:
    """Return an entry without the inner dict in which bitsandbytes hides its state from FSDP1."""
    flat: Entry = {}
    for name, value in entry.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def _check_names(optimizer: Optimizer, p: Tensor, entry: Entry, blocks: Sequence[BlockState]) -> None:
    """Refuse what torch lets pass: of a checkpoint it reads what it looks for, and leaves alone what is not there."""
    written = str(entry.pop(_NAMES, "")).split()
    if not isinstance(p, DTensor) or not optimizer.state.get(p):
        return
    needed = set(optimizer.state[p])
    found = {next((b.scales for b in blocks if name.startswith(b.scales)), name) for name in entry}
    if found == needed:
        found = set(written) or found
    if found != needed:
        raise CheckpointMismatchError(
            f"LowMemoryOptimizer: the checkpoint holds the optimizer state {sorted(found)}, and "
            f"{type(optimizer).__name__} needs {sorted(needed)}. Resume with the optimizer and options the checkpoint "
            "was written with, or start from its weights alone."
        )


def _local_entry(p: Tensor, entry: Entry, blocks: Sequence[BlockState]) -> Entry:
    described = tuple(block.scales + part for block in blocks for part in _PARTS)
    local = {name: _cut(p, value) for name, value in entry.items() if not name.startswith(described)}
    for block in blocks:
        # without a table the moments are 32-bit; without a description the scales of a plain parameter are its own
        if block.table in entry and (isinstance(p, DTensor) or any(name.startswith(described) for name in entry)):
            local[block.codes], local[block.scales] = _codes_and_scales(p, entry, local[block.codes], block)
    return local


def _cut(p: Tensor, value: Any) -> Any:
    if isinstance(value, DTensor):
        return local_part(value)
    if isinstance(value, Tensor) and isinstance(p, DTensor) and value.ndim and value.shape == p.shape:
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        return value[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
    return value


def _codes_and_scales(p: Tensor, entry: Entry, codes: Tensor, block: BlockState) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of this rank's piece: as they are, or in blocks of its own."""
    split = _Split.of(p)
    if codes.shape != local_part(p).shape:
        raise CheckpointMismatchError(
            f"LowMemoryOptimizer: the checkpoint holds 8-bit state of the shape {tuple(codes.shape)} for a parameter "
            f"of {tuple(local_part(p).shape)}. Resume with the same model and the same param groups in the same order."
        )
    described, first_column = _description(p, entry, split, block)
    scales_rk, begin_r1 = (tensor.to(codes.device) for tensor in described)
    if first_column is None:
        scales_b = flat_scales(scales_rk, begin_r1, split.columns, block.size)
        if scales_b is not None:
            return codes, scales_b
    matrix, scales_b = recode(
        codes.reshape(split.rows, split.columns),
        scales_rk,
        begin_r1,
        entry[block.table].to(codes.device),
        size=block.size,
        first_column=first_column or 0,
    )
    return matrix.view(codes.shape), scales_b


def _description(p: Tensor, entry: Entry, split: _Split, block: BlockState) -> tuple[tuple[Tensor, Tensor], int | None]:
    """Return the scales and beginnings of this rank's rows.

    Also the column of the described rows where this rank's piece begins, or ``None`` where they describe the piece.
    """
    own, whole_rows = split.keys(block), (block.scales + _PARTS[0], block.scales + _PARTS[1])
    other = [name for name in entry if name.startswith(f"{whole_rows[0]}_x") and name != own[0]]
    # Of a full checkpoint torch leaves what this run would have written beside what it found: the latter counts.
    if isinstance(p, DTensor) and block.scales in entry:  # written by an ordinary run
        rows = row_scales(entry[block.scales], p.shape[0] if p.ndim else 1, split.whole_columns, block.size)
    elif other:
        raise CheckpointMismatchError(
            f"LowMemoryOptimizer: the checkpoint's 8-bit state was split over the columns of a weight ({other[0]!r}), "
            f"and this run splits them over {split.parts}. Resume with the same tensor_parallel_size, or start from "
            "the checkpoint's weights alone."
        )
    elif whole_rows[0] in entry and not isinstance(entry[whole_rows[0]], DTensor):
        rows = entry[whole_rows[0]], entry[whole_rows[1]]
    else:
        return (local_part(entry[own[0]]), local_part(entry[own[1]])), None
    if split.first_column is None:
        raise CheckpointMismatchError(
            f"LowMemoryOptimizer: a weight of the shape {tuple(p.shape)} is split over its third or a later dimension, "
            "and its 8-bit state resumes from a checkpoint written with that split only. Start from the checkpoint's "
            "weights alone."
        )
    piece = slice(split.first_row, split.first_row + split.rows)
    exact = split.columns == split.whole_columns
    return (rows[0][piece], rows[1][piece]), None if exact else split.first_column
