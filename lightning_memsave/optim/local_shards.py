"""Step on the local shards of sharded (DTensor) parameters, for optimizers that know plain tensors only.

Outside of a step nothing changes: the groups hold the sharded parameters, so that schedulers, clipping and Lightning
see what they always see, and the state belongs to them. It is the plain state of this rank's shard.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memsave.optim._shard_blocks import BlockState
from lightning_memsave.optim._shard_checkpoint import local_part, local_state, sharded_state

__all__ = ["BlockState", "local_part", "shard_of", "standing_for", "step_on_local_shards", "whole"]

_WHOLE = "_memsave_whole"


# -- tensors -----------------------------------------------------------------------------------------------------------
def whole(tensor: Tensor) -> Tensor:
    """Return the sharded parameter that a tensor stands for in a step, or the tensor itself.

    What must be the same on every rank (whether the state is 8-bit, a user's override) is asked of this one.
    """
    result: Tensor = getattr(tensor, _WHOLE, tensor)
    return result


@contextmanager
def standing_for(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let ``whole`` return the second tensor of each pair for the first one meanwhile."""
    marked = [(tensor, p) for tensor, p in pairs if tensor is not p]
    for tensor, p in marked:
        setattr(tensor, _WHOLE, whole(p))
    try:
        yield
    finally:
        for tensor, _ in marked:
            delattr(tensor, _WHOLE)  # a tensor with attributes is not saved as plain data


def shard_of(p: Tensor) -> Tensor:
    """Return this rank's shard as a leaf of its own, for which ``whole`` returns ``p``; a plain tensor as it is."""
    if not isinstance(p, DTensor):
        return p
    local = local_part(p).detach().contiguous().requires_grad_(p.requires_grad)
    setattr(local, _WHOLE, p)
    return local


def _stand_in(p: DTensor) -> Tensor:
    local = shard_of(p)
    if p.grad is not None:
        gradient = p.grad
        if isinstance(gradient, DTensor) and gradient.placements != p.placements:
            # e.g. a norm under sequence parallelism: the sum over the ranks is still to be made
            gradient = gradient.redistribute(placements=p.placements)
        local.grad = local_part(gradient).detach().contiguous()
    return local


@contextmanager
def _on_local_shards(optimizer: Optimizer) -> Iterator[None]:
    """Give the optimizer plain tensors for the sharded parameters of its current groups, and their state."""
    outer = optimizer.param_groups
    pairs: list[tuple[DTensor, Tensor]] = []

    def local(p: Tensor) -> Tensor:
        if not isinstance(p, DTensor):
            return p
        pairs.append((p, _stand_in(p)))
        return pairs[-1][1]

    optimizer.param_groups = [{**group, "params": [local(p) for p in group["params"]]} for group in outer]
    for p, stand_in in pairs:
        if p in optimizer.state:
            optimizer.state[stand_in] = optimizer.state.pop(p)
    try:
        yield
    finally:
        for group, inner in zip(outer, optimizer.param_groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(inner, params=parameters)
        optimizer.param_groups = outer
        for p, stand_in in pairs:
            if stand_in in optimizer.state:
                optimizer.state[p] = optimizer.state.pop(stand_in)
            held = local_part(p)
            if held.data_ptr() != stand_in.data_ptr():  # it was not contiguous, or the library moved it
                held.detach().copy_(stand_in.detach())


# -- steps -------------------------------------------------------------------------------------------------------------
def step_on_local_shards(optimizer: Optimizer, blocks: Sequence[BlockState] = ()) -> None:
    """Let an element-wise optimizer step on the shards of its DTensor parameters, in place.

    ``step``, ``state_dict`` and ``load_state_dict`` of this instance change. State of the shape of the shard is saved
    as a DTensor placed as its parameter, block-wise state as described in ``_shard_blocks``: a distributed or a full
    checkpoint resumes bit for bit on the same ranks, and on any other number of them too.

    Args:
        optimizer: Its update of one value may depend on values of the same block at most.
        blocks: The moments that it keeps as codes with one scale a block.

    """
    function: Callable[..., Any] = optimizer.step.__func__  # type: ignore[attr-defined]
    if getattr(function, "hooked", False):
        function = function.__wrapped__  # type: ignore[attr-defined]  # step hooks are called once, outside
    load: Callable[..., Any] = optimizer.load_state_dict.__func__  # type: ignore[attr-defined]

    @Optimizer.profile_hook_step
    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), _on_local_shards(self):
            function(self)
        return loss

    def load_state_dict(self: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        local = local_state(self, state_dict, blocks)
        with _on_local_shards(self):
            load(self, local, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
    optimizer.load_state_dict = types.MethodType(load_state_dict, optimizer)  # type: ignore[method-assign]
    optimizer.register_state_dict_post_hook(lambda self, state_dict: sharded_state(self, state_dict, blocks))
