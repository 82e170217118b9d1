"""Cut a list of parameters into buckets whose gradients are reduced together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_memsave.errors import ConfigurationError

__all__ = ["Bucket", "gradient_dtype", "is_dense", "make_buckets", "same_shaped", "trained_parameters"]


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype on one device.

    Args:
        indices: Places in the plan's list of parameters.
        dtype: Dtype of the gradients.
        device: Where they are.
        sizes: Number of values of each.

    """

    indices: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int, ...]

    @property
    def alone(self) -> bool:
        """Whether one gradient fills the bucket: it is reduced where it is."""
        return len(self.indices) == 1

    @property
    def num_values(self) -> int:
        """Values of all gradients together."""
        return sum(self.sizes)


def gradient_dtype(parameter: nn.Parameter) -> torch.dtype:
    """Return the dtype of a parameter's gradient; torch lets it differ from the parameter's in newer versions."""
    if not parameter.is_leaf:
        return parameter.dtype
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def trained_parameters(
    module: nn.Module, known: Iterable[nn.Parameter], ignored: Iterable[str], *, subject: str
) -> list[tuple[str, nn.Parameter]]:
    """Return ``(name, parameter)`` of what trains now or trained before, in the order of ``named_parameters``.

    Raises:
        ConfigurationError: If a parameter is one whose gradient cannot be averaged as a dense tensor.

    """
    from torch.distributed.tensor import DTensor

    before, left_out = {id(parameter) for parameter in known}, set(ignored)
    found = [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if (parameter.requires_grad or id(parameter) in before) and name not in left_out
    ]
    sharded = [name for name, parameter in found if isinstance(parameter, DTensor)]
    if sharded:
        raise ConfigurationError(
            f"{subject}: {len(sharded)} parameters are already sharded (first: {sharded[0]}, a DTensor), and a whole "
            "copy on every rank is what this strategy averages. Use ModelParallelStrategy."
        )
    sparse = [
        name
        for name, m in module.named_modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse and m.weight.requires_grad
    ]
    if sparse:
        raise ConfigurationError(
            f"{subject}: {sparse[0]} makes sparse gradients (sparse=True), and dense ones are averaged. "
            'Build it with sparse=False, or use strategy="ddp".'
        )
    return found


def make_buckets(parameters: Sequence[nn.Parameter], order: Sequence[int], bucket_bytes: int) -> list[Bucket]:
    """Cut the parameters into buckets of at most ``bucket_bytes``, in the order their gradients are expected.

    A gradient as large as a bucket has one of its own. Dtypes and devices are not mixed; a bucket stands where its
    last gradient is expected, so that none waits for a later one.

    Args:
        parameters: All parameters of the plan.
        order: Indices of ``parameters`` in the order in which the gradients are expected.
        bucket_bytes: Largest size of a bucket of several gradients.

    Example:
        >>> layers = [nn.Parameter(torch.zeros(n)) for n in (1, 2, 100, 3)]
        >>> [bucket.indices for bucket in make_buckets(layers, [3, 2, 1, 0], bucket_bytes=32)]
        [(2,), (3, 1, 0)]

    """
    done: list[tuple[int, list[int]]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[int, list[int], int]] = {}
    for place, index in enumerate(order):
        parameter = parameters[index]
        key = (gradient_dtype(parameter), parameter.device)
        size = parameter.numel() * key[0].itemsize
        if size >= bucket_bytes:
            done.append((place, [index]))
            continue
        last, members, filled = filling.pop(key, (place, [], 0))
        if filled + size > bucket_bytes:
            done.append((last, members))
            members, filled = [], 0
        filling[key] = (place, [*members, index], filled + size)
    done += [(last, members) for last, members, _ in filling.values()]
    return [
        Bucket(
            indices=tuple(members),
            dtype=gradient_dtype(parameters[members[0]]),
            device=parameters[members[0]].device,
            sizes=tuple(parameters[index].numel() for index in members),
        )
        for _, members in sorted(done)
    ]


def same_shaped(values: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a flat buffer as a tensor with the parameter's shape, in its memory layout if it is dense."""
    if is_dense(parameter):
        return values.as_strided(parameter.shape, parameter.stride(), values.storage_offset())
    return values.view(parameter.shape)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's values fill a stretch of memory without gaps or overlaps."""
    expected = 1
    for size, stride in sorted(((n, s) for n, s in zip(tensor.shape, tensor.stride()) if n != 1), key=lambda p: p[1]):
        if stride != expected:
            return False
        expected *= size
    return True
