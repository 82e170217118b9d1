"""Recognize a frozen weight again: what it is, its shape, and a hash of its content.

The content hash is ``sum_i element_i * (2 i + 1)  mod 2**64`` over every element read as an integer of its own
width, so that it

* reads all bytes once and never copies a weight (the largest temporary is ``16 * 2**20`` bytes);
* is the same on every device and at every sharding over the first dimension: integer sums do not round;
* notices a changed, moved or swapped element. It is no cryptographic hash: it tells bases apart, it does not
  protect against somebody who forges one.

Bytes can only be compared with bytes of the same kind. A base quantized here and not there has other bytes, and so has
one in bf16 here and fp32 there (unless the wider one is at hand now: it is rounded, then compared); 4-bit and 8-bit
codes may also differ in the last place between kinds of device, which round scales differently. So a fingerprint keeps
kind and device apart from the content, and ``compare`` says "not comparable" rather than "different" there; the shapes
are compared always.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["compare", "content_hash", "fingerprint", "logical_shape", "sample_hash", "weight_kind"]

_CHUNK = 2**20
_SAMPLE = 2**16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def weight_kind(weight: Tensor) -> str:
    """Return how a weight is stored: ``"nf4-64"``, ``"nf4-64-double"``, ``"int8"``, or its dtype.

    Example:
        >>> weight_kind(torch.zeros(2, dtype=torch.bfloat16))
        'bfloat16'

    """
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return f"{state.quant_type}-{state.blocksize}" + ("-double" if state.nested else "")
    return str(weight.dtype).removeprefix("torch.")


def logical_shape(weight: Tensor) -> list[int]:
    """Return the shape of the weight that is meant, also where 4-bit codes are stored packed."""
    state = getattr(weight, "quant_state", None)
    return list(weight.shape if state is None else state.shape)


@torch.no_grad()
def content_hash(weight: Tensor) -> str | None:
    """Return the hash of all elements as 16 hexadecimal digits.

    Args:
        weight: Any tensor. A ``DTensor`` sharded over its first dimension hashes like the whole tensor; then every
            rank must call this.

    Returns:
        ``None`` where the content cannot be read: meta tensors, and shardings over another dimension.

    Example:
        >>> content_hash(torch.tensor([1, 2], dtype=torch.uint8))  # 1 * 1 + 2 * 3
        '0000000000000007'

    """
    if isinstance(weight, DTensor):
        return _sharded_hash(weight)
    if weight.device.type == "meta":
        return None
    return _hex(_weighted_sum(weight, 0))


def _hex(value: int) -> str:
    return f"{value % 2**64:016x}"


def _as_integers(weight: Tensor) -> Tensor:
    flat = weight.detach().contiguous().view(-1)
    if flat.dtype == torch.bool:
        flat = flat.view(torch.uint8)
    return flat.view(_INTEGERS[flat.element_size()])


def _weighted_sum(weight: Tensor, offset: int) -> int:
    """Return ``sum_i x_i * (2 (i + offset) + 1)`` as a signed 64-bit sum that wraps."""
    flat = _as_integers(weight)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    odd = torch.arange(min(_CHUNK, flat.numel()), dtype=torch.int64, device=flat.device).mul_(2).add_(1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64, copy=True)  # changed in place below
        plain = chunk.sum()
        total += chunk.mul_(odd[: chunk.numel()]).sum() + plain * (2 * (start + offset))
    return int(total)


def _sharded_hash(weight: DTensor) -> str | None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(isinstance(p, Replicate) or (type(p) is Shard and p.dim == 0) for p in weight.placements):
        return None
    local = weight.to_local()
    mesh = weight.device_mesh
    if local.device.type == "meta":
        return None
    _, offsets = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    row = weight.numel() // weight.shape[0] if weight.dim() and weight.shape[0] else 1
    factor = 2 if weight.element_size() == 16 else 1
    value = _weighted_sum(local, int(offsets[0]) * row * factor) if local.numel() else 0
    # The device of the mesh, not of the weight: with CPU offload the process group may know the accelerator only.
    device = torch.device("cpu") if mesh.device_type == "cpu" else torch.device(mesh.device_type)
    total = torch.tensor(value, dtype=torch.int64, device=device)
    for axis, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            dist.all_reduce(total, group=mesh.get_group(axis))
    return _hex(int(total))


@torch.no_grad()
def sample_hash(weight: Tensor) -> int:
    """Return a quick hash of at most 65,536 evenly spaced elements of this rank's part, to notice a moving weight."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if local.device.type == "meta" or not local.numel():
        return 0
    flat = _as_integers(local)
    return _weighted_sum(flat[:: -(-flat.numel() // _SAMPLE)], 0)


def fingerprint(weight: Tensor, content: str | None) -> dict[str, Any]:
    """Return the plain data a checkpoint keeps of one frozen weight, given its ``content_hash``."""
    return {
        "kind": weight_kind(weight),
        "shape": logical_shape(weight),
        "device": weight.device.type,
        "content": content,
    }


def compare(saved: dict[str, Any], weight: Tensor) -> str:
    """Compare a weight with the fingerprint in a checkpoint.

    Returns:
        ``"equal"``, ``"shape"`` or ``"content"`` (they differ), or ``"kind"`` (stored in another form, so that only
        the shapes could be compared).

    """
    packed = weight_kind(weight) == "uint8" or saved["kind"] == "uint8"  # sharding hides the 4-bit state
    if saved["shape"] != logical_shape(weight):
        return "kind" if packed and saved["kind"] != weight_kind(weight) else "shape"
    if saved["kind"] != weight_kind(weight):
        weight = _rounded(weight, saved["kind"])
    if saved["kind"] != weight_kind(weight) or saved["content"] is None:
        return "kind"
    quantized = getattr(weight, "quant_state", None) is not None or weight.dtype in (torch.int8, torch.uint8)
    if quantized and saved["device"] != weight.device.type:
        return "kind"
    content = content_hash(weight)
    if content is None:
        return "kind"
    return "equal" if content == saved["content"] else "content"


def _rounded(weight: Tensor, kind: str) -> Tensor:
    """Return a floating weight in the narrower floating dtype of that name, or as it is if ``kind`` is none."""
    dtype = getattr(torch, kind, None)
    narrower = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize < weight.dtype.itemsize
    return weight.detach().to(dtype) if weight.is_floating_point() and narrower else weight
