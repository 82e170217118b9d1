"""What bitsandbytes' optimizers need to keep their promises: per-tensor width, paging after a resume, bounded steps.

Everything is set on the instance: bitsandbytes keeps its own overrides in one object for the whole process.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave._imports import require
from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.optim._shard_blocks import BlockState
from lightning_memsave.optim._shard_checkpoint import local_state
from lightning_memsave.optim.local_shards import whole

__all__ = ["BLOCKS", "BLOCK_SIZE", "MIN_8BIT_ELEMENTS", "MIN_PAGED_ELEMENTS", "block_state_bytes", "finish"]

BLOCK_SIZE = 256  # values that share one fp32 scale
MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep 32-bit state
MIN_PAGED_ELEMENTS = 100_000  # smaller tensors are never paged
_SLICE = 2**20  # values of one update on the CPU; a multiple of BLOCK_SIZE
_MOMENTS = ("state1", "state2")
BLOCKS = tuple(BlockState(codes=f"state{i}", scales=f"absmax{i}", table=f"qmap{i}", size=BLOCK_SIZE) for i in (1, 2))


def block_state_bytes(num_elements: int, num_moments: int) -> int:
    """Return the bytes of block-wise 8-bit moments: one byte a value and one fp32 scale a block of 256.

    Example:
        >>> block_state_bytes(4096, 2)
        8320

    """
    return num_moments * (num_elements + 4 * -(-num_elements // BLOCK_SIZE))


def finish(optimizer: Any, *, keep_32bit: Collection[int], num_moments: int) -> Optimizer:
    """Complete a new bitsandbytes optimizer in place.

    Args:
        optimizer: One of bitsandbytes' optimizers.
        keep_32bit: ``id`` of the parameters whose state stays fp32.
        num_moments: 2 for AdamW, 1 for Lion.

    """
    _override_width(optimizer, keep_32bit)
    optimizer.get_config = types.MethodType(_get_config, optimizer)
    if all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"]):
        optimizer.is_paged = False  # there is no unified memory to page to
    optimizer.load_state_dict = types.MethodType(_loader(num_moments), optimizer)
    optimizer.update_step = types.MethodType(_update_step, optimizer)
    optimizer.register_state_dict_post_hook(_unmark_paged)
    return optimizer  # type: ignore[no-any-return]


def _override_width(optimizer: Any, keep_32bit: Collection[int]) -> None:
    """Keep the overrides by parameter: a step may see one parameter, or the shards of this rank, at other positions."""
    shared, kept = optimizer.mng, {"optim_bits": 32}
    positioned = {
        id(p): shared.index2config[i, j]
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
        if (i, j) in shared.index2config
    }
    mine: Any = object.__new__(type(shared))  # a singleton whose __init__ refuses
    mine.__dict__.update(shared.__dict__)
    # the user's own overrides stay in force, and win
    mine.pid2config = {**dict.fromkeys(keep_32bit, kept), **positioned, **shared.pid2config}
    mine.index2config = {}
    optimizer.mng = mine


def _get_config(optimizer: Any, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = type(optimizer).get_config(optimizer, gindex, pindex, group)
    p = optimizer.param_groups[gindex]["params"][pindex]
    if whole(p) is not p:  # a shard: every rank, and any number of ranks, decides as for the whole tensor
        config.update(optimizer.mng.pid2config.get(id(whole(p)), {}))
        config["optim_bits"] = config["optim_bits"] if whole(p).numel() >= config["min_8bit_size"] else 32
        config["min_8bit_size"] = 0
    return config


# -- checkpoints ------------------------------------------------------------------------------------------------------
def _unmark_paged(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Take the paging marks off the saved tensors: what is loaded from a file is not paged."""

    def plain(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and getattr(value, "is_paged", False) else value

    state = {
        key: {name: plain(value) for name, value in entry.items()} if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _loader(num_moments: int) -> Callable[..., None]:
    expected = set(_MOMENTS[:num_moments])

    def load_state_dict(optimizer: Any, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        state_dict = local_state(optimizer, state_dict, BLOCKS)  # of a run on sharded parameters, perhaps
        _check_moments(optimizer, state_dict, expected)
        # Moments that will be paged must not pass through the device: there may be no room for them there.
        type(optimizer).load_state_dict(optimizer, state_dict, move_to_device=False)
        if move_to_device:
            for p, state in optimizer.state.items():
                if isinstance(p, Tensor):
                    _place(optimizer, p, state)

    return load_state_dict


def _check_moments(optimizer: Any, state_dict: Mapping[str, Any], expected: set[str]) -> None:
    wrapper = getattr(type(optimizer), "_FSDP_WRAPPED_QUANT_STATE_KEY", "")
    for entry in state_dict["state"].values():
        found = {*entry, *entry.get(wrapper, {})} - {wrapper, "step"}
        if found & set(_MOMENTS) != expected:
            raise CheckpointMismatchError(
                f"LowMemoryOptimizer: the checkpoint holds optimizer state {sorted(found)}, and "
                f"{type(optimizer).__name__} needs {sorted(expected)}. Resume with the optimizer the checkpoint was "
                "written with, or start from its weights alone (load_from_checkpoint, then fit without ckpt_path)."
            )


def _place(optimizer: Any, p: Tensor, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if name.startswith("qmap"):  # one table for all parameters, as in a fresh optimizer
            key = "dynamic" if name == "qmap1" else "udynamic"
            if key not in optimizer.name2qmap:
                optimizer.fill_qmap()
            optimizer.name2qmap[key] = state[name] = optimizer.name2qmap[key].to(p.device)
        elif name in _MOMENTS and _pages(optimizer, p):
            state[name] = _paged_copy(optimizer, value, p.device)
        else:
            state[name] = value.detach().to(p.device)


def _pages(optimizer: Any, p: Tensor) -> bool:
    return optimizer.is_paged and p.device.type != "cpu" and p.numel() >= MIN_PAGED_ELEMENTS


def _paged_copy(optimizer: Any, value: Tensor, device: torch.device) -> Tensor:
    functional = require("bitsandbytes.functional", "a paged optimizer")
    buffer: Tensor = functional.get_paged(*value.shape, dtype=value.dtype, device=device)
    buffer.copy_(value)
    # Lightning moves loaded state to the device with .to(), which would make an ordinary tensor of it.
    buffer.to = lambda *_args, **_kwargs: buffer  # type: ignore[method-assign]
    optimizer.page_mng.paged_tensors.append(buffer)
    return buffer


# -- the step on a CPU ------------------------------------------------------------------------------------------------
def _update_step(optimizer: Any, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
    """Update a large CPU tensor in slices: bitsandbytes' CPU path makes up to five fp32 copies of what it is given.

    Every operation is per value or per block of 256, so the slices give the same bits. For 28 million values (the
    embedding of a 135M model): 0 instead of 540 MiB of copies with 8-bit state, 0 instead of 324 MiB with fp32 state.
    """
    update = type(optimizer).update_step
    state = optimizer.state[p]
    if p.numel() == 0:  # this rank holds nothing of the tensor; a CUDA kernel cannot be launched for nothing
        state["step"] += 1
        return
    moments = [state[name] for name in _MOMENTS if name in state]
    sliceable = p.device.type == "cpu" and p.numel() > _SLICE and "unorm_vec" not in state
    if not sliceable or p.grad is None or not all(t.is_contiguous() for t in (p, p.grad, *moments)):
        update(optimizer, group, p, gindex, pindex)
        return
    for start in range(0, p.numel(), _SLICE):
        stop = min(start + _SLICE, p.numel())
        piece = p.detach().view(-1)[start:stop]
        piece.grad = p.grad.view(-1)[start:stop]
        optimizer.state[piece] = {name: _slice(name, value, start, stop) for name, value in state.items()}
        try:
            update(optimizer, group, piece, gindex, pindex)
        finally:
            del optimizer.state[piece]
    state["step"] += 1


def _slice(name: str, value: Any, start: int, stop: int) -> Any:
    if name in _MOMENTS:
        return value.view(-1)[start:stop]
    if name.startswith("absmax"):
        return value[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)]
    return value
