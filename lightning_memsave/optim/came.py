"""CAME: Adafactor with a first moment whose unsteady rows and columns take smaller steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._factored import factored_state, mean_square, second_moment
from lightning_memsave.optim.per_parameter import PerParameterOptimizer, compute_dtype

__all__ = ["CAME"]


class CAME(PerParameterOptimizer):
    """Step by a first moment over the root of two factored second moments: of the gradient and of its unsteadiness.

    **Saves** of the 8 bytes a value of AdamW all but ``4 * numel + 8 * (rows + columns)`` bytes a matrix; vectors keep
    8 bytes a value.
    **Costs** three more passes over the gradient. Temporaries are at most seven blocks of 2**20 values (2**22 on an
    accelerator), whatever the size of the matrix.
    **Numerics** are statistical: another rule than AdamW; a step is at most about ``lr`` in root mean square.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups; the last two dimensions of a tensor are its rows and columns.
        lr: The size of a step.
        betas: Of the first moment, the second moment and the unsteadiness.
        eps: Added to the squared gradient, and to the squared distance of a step from the first moment.
        clip_threshold: Root mean square above which a normalized gradient is scaled down.
        weight_decay: Decoupled: weights shrink by ``lr * weight_decay`` of themselves in a step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 4))
        >>> weight.grad = torch.ones(4, 4)
        >>> CAME([weight], lr=0.1).step()
        >>> bool((weight < 1).all())
        True

    Source:
        Luo et al. 2023, https://arxiv.org/abs/2307.02047, algorithm 2.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "clip_threshold": clip_threshold}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return a first moment, and rows and columns of two second moments (one, of every value, for a vector)."""
        state = {"exp_avg": torch.zeros(p.shape, dtype=compute_dtype(p), device=device), **factored_state(p, device)}
        return {**state, **factored_state(p, device, "exp_avg_res")} if p.ndim >= 2 else state

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step one tensor in four passes over its blocks: two second moments, the size of the step, the step."""
        beta1, beta2, beta3 = group["betas"]
        dtype, lr = compute_dtype(p), float(group["lr"])
        moment = second_moment(p, state)
        weights, gradients, first = moment.shaped(p), moment.shaped(gradient), moment.shaped(state["exp_avg"])
        moment.add(beta2, lambda index: gradients[index].to(dtype).square().add_(group["eps"][0]))

        def normalized(index: Any) -> Tensor:
            return moment.normalized(gradients[index].to(dtype), index)

        size = mean_square((normalized(index) for index in moment.blocks()), p.numel()).sqrt_()
        scale = size.div_(group["clip_threshold"]).clamp_(min=1.0).reciprocal_()

        def unsteadiness(index: Any) -> Tensor:
            step = normalized(index).mul_(scale)
            return step.sub_(first[index].lerp_(step, 1 - beta1)).square_().add_(group["eps"][1])

        trusted = second_moment(p, state, "exp_avg_res") if p.ndim >= 2 else None
        if trusted is not None:
            trusted.add(beta3, unsteadiness)
        for index in moment.blocks():
            if trusted is None:
                unsteadiness(index)
            step = first[index] if trusted is None else trusted.normalized(first[index], index)
            block = weights[index]
            block.copy_(block.to(dtype).mul(1 - lr * group["weight_decay"]).sub_(step, alpha=lr))
