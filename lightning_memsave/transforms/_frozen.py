"""Linear layers with a frozen weight: compute in the input's dtype, save the weight as it is stored.

``F.linear`` on a cast copy of a weight keeps that copy for backward: ``in * out * 2`` bytes a layer under bf16
autocast, which never caches frozen weights. Here backward casts (or dequantizes) once more instead, and nothing but the
stored weight is saved. Values and gradients are bitwise those of ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memsave.transforms._patch import InstanceForward

__all__ = [
    "autocast_dtype",
    "forward_frozen_conv1d",
    "forward_frozen_embedding",
    "forward_frozen_linear",
    "frozen_linear",
    "plain_weight",
]

# (dtype, stored tensors) -> the (out, in) weight in that dtype
Unpack = Callable[..., Tensor]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast computes in on the tensor's device, or ``None`` outside autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def plain_weight(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Return a stored ``(out, in)`` weight in a dtype."""
    return weight.to(dtype)


def transposed_weight(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Return a stored ``(in, out)`` weight as ``(out, in)`` in a dtype."""
    return weight.to(dtype).t()


class _FrozenLinear(torch.autograd.Function):
    """``x @ W.T + b`` that saves the stored form of W only, and never x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, unpack: Unpack, *stored: Tensor) -> Tensor:
        ctx.unpack = unpack
        ctx.save_for_backward(*stored)
        return F.linear(x, unpack(x.dtype, *stored), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        stored = ctx.saved_tensors  # read once: under activation checkpointing a second read is an error
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.matmul(ctx.unpack(grad.dtype, *stored))
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, *(None for _ in stored)


def frozen_linear(x: Tensor, bias: Tensor | None, unpack: Unpack, *stored: Tensor) -> Tensor:
    """Return ``x @ W.T + b`` in autocast's dtype, or in that of ``x`` outside autocast.

    Args:
        x: ``(..., in)``.
        bias: ``(out,)`` or ``None``; may require a gradient.
        unpack: Module-level function that makes the ``(out, in)`` weight from what is stored.
        *stored: Tensors without gradient.

    """
    dtype = autocast_dtype(x) or x.dtype
    if bias is not None:
        bias = bias.to(dtype)
    out: Tensor = _FrozenLinear.apply(x.to(dtype), bias, unpack, *stored)  # type: ignore[no-untyped-call]
    return out


def forward_frozen_linear(patch: InstanceForward, x: Tensor) -> Tensor:
    """Run ``nn.Linear.forward``; a weight that was unfrozen meanwhile takes the ordinary way."""
    layer: Any = patch.module
    if layer.weight.requires_grad:
        return F.linear(x, _as(x, layer.weight), None if layer.bias is None else _as(x, layer.bias))
    return frozen_linear(x, layer.bias, plain_weight, layer.weight)


def forward_frozen_conv1d(patch: InstanceForward, x: Tensor) -> Tensor:
    """Run transformers' ``Conv1D``, a linear layer with an ``(in, out)`` weight."""
    weight, bias = patch.module.get_parameter("weight"), patch.module.get_parameter("bias")
    if weight.requires_grad:
        return F.linear(x, _as(x, weight).t(), _as(x, bias))
    return frozen_linear(x, bias, transposed_weight, weight)


def forward_frozen_embedding(patch: InstanceForward, ids: Tensor) -> Tensor:
    """Look rows up in a narrow table and return them in the dtype the table had."""
    return patch.inner(ids).to(patch.options["dtype"])  # type: ignore[no-any-return]


def _as(x: Tensor, weight: Tensor) -> Tensor:
    return weight if autocast_dtype(x) is not None else weight.to(x.dtype)
