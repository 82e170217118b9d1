"""Plain AdamW on one tensor, in blocks: what the small parameters of every other rule get."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim.per_parameter import compute_dtype, flat_blocks

__all__ = ["adamw_state", "adamw_state_bytes", "adamw_update", "apply_adamw"]


def adamw_state(p: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return two moments of zeros with the shape of ``p``."""
    return {name: torch.zeros(p.shape, dtype=compute_dtype(p), device=device) for name in ("exp_avg", "exp_avg_sq")}


def adamw_state_bytes(p: Tensor) -> int:
    """Return ``8 * numel``, twice that for fp64 parameters."""
    return 2 * p.numel() * compute_dtype(p).itemsize


def apply_adamw(weights: Tensor, first: Tensor, second: Tensor, step: int, lr: float, group: Mapping[str, Any]) -> None:
    """Subtract the bias-corrected step from fp32 ``weights`` in place, after decoupled weight decay."""
    beta1, beta2 = group["betas"]
    weights.mul_(1 - lr * group["weight_decay"])
    denominator = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weights.addcdiv_(first, denominator, value=-lr / (1 - beta1**step))


def adamw_update(p: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Step a contiguous tensor in place; decay is decoupled, as in ``torch.optim.AdamW``."""
    beta1, beta2 = group["betas"]
    dtype, lr = compute_dtype(p), float(group["lr"])
    flat, flat_gradient = p.view(-1), gradient.view(-1)
    moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    for block in flat_blocks(p):
        g = flat_gradient[block].to(dtype)
        first, second = (moment[block] for moment in moments)
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        weights = flat[block].to(dtype)
        apply_adamw(weights, first, second, state["step"], lr, group)
        if weights.data_ptr() != flat[block].data_ptr():
            flat[block].copy_(weights)
