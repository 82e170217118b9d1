"""Make the copies of a module on all ranks equal: same parameters, then same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory._reach import storages, tensors_in

__all__ = ["broadcast_tensors", "check_same_plan", "global_rank", "state_tensors"]

# Small tensors travel together in buffers of this size; larger ones are received where they are.
_BUFFER_BYTES = 16 << 20


def check_same_plan(
    named: Sequence[tuple[str, nn.Parameter]], group: dist.ProcessGroup | None, *, subject: str
) -> None:
    """Check that every rank trains the same parameters, with the same shapes, dtypes and memory layouts.

    Raises:
        ConfigurationError: On every rank, naming the first difference.

    """
    mine = [(name, tuple(p.shape), str(p.dtype), tuple(p.stride())) for name, p in named]
    plans: list[list[tuple[object, ...]]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(plans, mine, group=group)
    for rank, plan in enumerate(plans):
        for ours, theirs in zip_longest(plans[0], plan):
            if ours != theirs:
                raise ConfigurationError(
                    f"{subject}: the ranks do not train the same parameters. Rank 0 has {_show(ours)}, rank {rank} has "
                    f"{_show(theirs)}. Build the module the same way on every rank, and freeze or unfreeze the same "
                    "parameters at the same step."
                )


def _show(entry: tuple[object, ...] | None) -> str:
    if entry is None:
        return "no further parameter"
    name, shape, dtype, strides = entry
    return f"{name} {list(shape)} {str(dtype).removeprefix('torch.')} with strides {strides}"  # type: ignore[call-overload]


def state_tensors(module: nn.Module, ignored: Sequence[str] = ()) -> list[Tensor]:
    """Return all tensors a module computes with: parameters, buffers, and what packed weights need to be read.

    A quantized weight is bytes beside scales that are neither parameters nor buffers: taken from another rank without
    its scales it would be another weight.
    """
    left_out = set(ignored)
    named = [pair for pair in (*module.named_parameters(), *module.named_buffers()) if pair[0] not in left_out]
    found = [tensor for _, tensor in named]
    for name, tensor in named:
        found += _companions(module.get_submodule(name.rpartition(".")[0]), tensor)
    unique = {id(tensor): tensor for tensor in found}
    plain = [stored for tensor in unique.values() for _, stored in storages(tensor.detach())]
    return [tensor for tensor in plain if tensor.device.type != "meta"]


def _companions(owner: nn.Module, tensor: Tensor) -> Iterator[Tensor]:
    """Yield the scales of a bitsandbytes weight, wherever the layer keeps them at the moment."""
    if tensor.is_floating_point() or tensor is not getattr(owner, "weight", None):
        return
    for holder in (tensor, owner, getattr(owner, "state", None)):
        for attribute in ("quant_state", "SCB"):
            yield from tensors_in(getattr(holder, attribute, None))


def broadcast_tensors(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Overwrite tensors on every rank with those of rank zero, bit by bit, whatever their dtype.

    Sent as bytes, since not every backend knows every dtype. At most ``16 MiB`` of extra memory, or that of one
    tensor that is not contiguous.
    """
    source = global_rank(group)
    together: list[Tensor] = []
    for tensor in [_stored(tensor) for tensor in tensors if tensor.numel()]:
        size = tensor.numel() * tensor.itemsize
        if together and (
            together[0].device != tensor.device or size + sum(t.numel() * t.itemsize for t in together) > _BUFFER_BYTES
        ):
            _broadcast(together, source, group)
            together = []
        together.append(tensor)
    if together:
        _broadcast(together, source, group)


def global_rank(group: dist.ProcessGroup | None) -> int:
    """Return the global rank of a group's first member."""
    return 0 if group is None else dist.get_global_rank(group, 0)


def _stored(tensor: Tensor) -> Tensor:
    """Return a view of the values that exist: an expanded tensor shows some of them several times."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _broadcast(tensors: Sequence[Tensor], source: int, group: dist.ProcessGroup | None) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.broadcast(_bytes(tensors[0]), source, group=group)
        return
    buffer = torch.cat([_bytes(tensor.contiguous()) for tensor in tensors])
    dist.broadcast(buffer, source, group=group)
    for tensor, part in zip(tensors, torch.split(buffer, [t.numel() * t.itemsize for t in tensors])):
        # a clone is aligned, as the view of another dtype must be
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
