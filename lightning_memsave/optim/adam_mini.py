"""Adam-mini: one second moment a row of a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._adamw_rule import adamw_state, adamw_state_bytes, adamw_update
from lightning_memsave.optim.per_parameter import PerParameterOptimizer, block_values, compute_dtype

__all__ = ["AdamMini", "adam_mini_state_bytes"]


def adam_mini_state_bytes(p: Tensor) -> int:
    """Return ``4 * numel + 4 * rows`` for a tensor with rows, ``8 * numel`` for a vector.

    Example:
        >>> adam_mini_state_bytes(torch.zeros(10, 20))
        840

    """
    if p.ndim < 2:
        return adamw_state_bytes(p)
    return (p.numel() + p.shape[0]) * compute_dtype(p).itemsize


class AdamMini(PerParameterOptimizer):
    """Step as AdamW does, with one second moment for each row of a matrix.

    A row (the first dimension) is what makes one output of a linear layer or convolution, or one token of an
    embedding: the blocks of the paper, but for queries and keys, where the paper takes a whole head and this takes its
    rows, which needs no knowledge of the model.

    **Saves** of the 8 bytes a value of AdamW 4: ``4 * numel + 4 * rows`` bytes are kept a matrix, and 8 bytes a value
    of a vector.
    **Costs** nothing; temporaries are at most seven blocks of 2**20 values (2**22 on an accelerator).
    **Numerics** are statistical: AdamW's rule with a coarser second moment, and AdamW itself for vectors.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups.
        lr: As for AdamW.
        betas: As for AdamW.
        eps: As for AdamW.
        weight_decay: Decoupled, as in AdamW.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 4))
        >>> weight.grad = torch.ones(4, 4)
        >>> AdamMini([weight], lr=0.1, weight_decay=0.0).step()
        >>> round(weight[0, 0].item(), 6)
        0.9

    Source:
        Zhang et al. 2024, https://arxiv.org/abs/2406.16793, algorithm 1.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return a first moment and a second moment a row, or those of AdamW for a vector."""
        if p.ndim < 2:
            return {**adamw_state(p, device)}
        dtype = compute_dtype(p)
        return {
            "exp_avg": torch.zeros(p.shape, dtype=dtype, device=device),
            "exp_avg_sq_mean": torch.zeros(p.shape[0], dtype=dtype, device=device),
        }

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step some rows at a time; a vector as AdamW does."""
        if p.ndim < 2:
            adamw_update(p, gradient, state, group)
            return
        beta1, beta2 = group["betas"]
        dtype, lr, step = compute_dtype(p), float(group["lr"]), state["step"]
        weights, gradients, first = (t.view(p.shape[0], -1) for t in (p, gradient, state["exp_avg"]))
        second, size = state["exp_avg_sq_mean"], max(1, block_values(p) // weights.shape[1])
        for start in range(0, p.shape[0], size):
            rows = slice(start, start + size)
            g = gradients[rows].to(dtype)
            second[rows].mul_(beta2).add_(g.square().mean(dim=1), alpha=1 - beta2)
            first[rows].lerp_(g, 1 - beta1)
            scale = second[rows].sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            scale = scale.reciprocal_().mul_(lr / (1 - beta1**step)).unsqueeze(1)
            block = weights[rows]
            block.copy_(block.to(dtype).mul(1 - lr * group["weight_decay"]).sub_(first[rows] * scale))
