"""APOLLO: gradients scaled channel by channel as AdamW would, seen through a random projection."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._adamw_rule import adamw_state, adamw_update
from lightning_memsave.optim._factored import mean_square
from lightning_memsave.optim._low_rank import LowRankMatrix, is_low_rank, matrix_shape
from lightning_memsave.optim.per_parameter import PerParameterOptimizer, compute_dtype

__all__ = ["ApolloAdamW"]

_GROWTH = 1.01  # most that the norm of a step may grow in one step


class ApolloAdamW(PerParameterOptimizer):
    """Step matrices along their gradient, each channel scaled as AdamW would in a random low-rank projection.

    Vectors, matrices whose shorter side is at most ``rank``, and the parameters named in ``keep_32bit`` (embeddings,
    norms, heads) go to AdamW, in the same groups. A tensor of more than two dimensions is flattened to a matrix;
    channels run along its longer side.

    **Saves** of the ``8 * rows * columns`` bytes of AdamW all but ``8 * rank * longer + 4``. The projection is made
    anew in every step from a seed and not kept.
    **Costs** one thin matrix product a step. Temporaries are at most seven blocks of 2**20 values (2**22 on an
    accelerator) and ``4 * rank * (3 * longer + shorter)`` bytes.
    **Numerics** are statistical: another rule than AdamW. Random numbers come from a generator of its own, which
    differs between the CPU and an accelerator.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups.
        lr: Of both rules.
        betas: As for AdamW.
        eps: As for AdamW.
        rank: Of the projection; 1 with ``scale=128**0.5`` and ``per_channel=False`` is APOLLO-Mini.
        update_proj_gap: Steps for which one projection is used.
        scale: Of a step of the projected matrices.
        per_channel: One factor a channel, instead of one a matrix.
        seed: Of the projections.
        weight_decay: Decoupled, as in AdamW, and not scaled.
        keep_32bit: ``id`` of the parameters that go to AdamW besides vectors.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> weight.grad = torch.ones(8, 6)
        >>> optimizer = ApolloAdamW([weight], lr=0.1, rank=2)
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['exp_avg', 'exp_avg_sq', 'norm', 'step']

    Source:
        Zhu et al. 2024, https://arxiv.org/abs/2412.05270, algorithm 1; the limit on the growth of a step: Chen et al.
        2024, https://arxiv.org/abs/2410.01623.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 256,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        per_channel: bool = True,
        seed: int = 0,
        weight_decay: float = 0.01,
        keep_32bit: Collection[int] = (),
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        super().__init__(params, {**defaults, **projection, "per_channel": per_channel, "seed": seed}, keep_32bit)

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return two thin moments and the norm of the last step, or the moments of AdamW."""
        rank, dtype = group["rank"], compute_dtype(p)
        if not is_low_rank(p, rank, self.keeps_32bit(p)):
            return {**adamw_state(p, device)}
        shape = (max(matrix_shape(p)), rank)
        moments = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq")}
        return {**moments, "norm": torch.zeros((), dtype=dtype, device=device)}

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step one tensor by the rule its state was made for."""
        if "norm" not in state:
            adamw_update(p, gradient, state, group)
            return
        lr, matrix, weights = float(group["lr"]), LowRankMatrix(gradient), LowRankMatrix(p)
        factor = _factor(matrix, state, group)

        def steps(block: slice) -> Tensor:
            return matrix.rows(block) * (factor if factor.ndim == 0 else factor[block] if matrix.tall else factor.T)

        norm = mean_square((steps(block) for block in matrix.row_blocks()), 1).sqrt_()
        limit = torch.where(state["norm"] > 0, state["norm"] * _GROWTH / norm.clamp(min=1e-30), 1.0).clamp_(max=1.0)
        state["norm"] = norm * limit
        for block in weights.row_blocks():
            new = weights.rows(block).mul(1 - lr * group["weight_decay"])
            weights.x[block].copy_(new.sub_(steps(block).mul_(limit * lr)))


def _factor(matrix: LowRankMatrix, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Return how much AdamW lengthens each channel of the projected gradient, ``(longer, 1)``, or the whole of it."""
    beta1, beta2 = group["betas"]
    step = state["step"]
    low = matrix.project(_projection(matrix, (step - 1) // group["update_proj_gap"], group))
    first = state["exp_avg"].lerp_(low, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
    scaled = first / second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    before, after = (t.norm(dim=1, keepdim=True) if group["per_channel"] else t.norm() for t in (low, scaled))
    factor: Tensor = after / before.clamp_(min=1e-30) * (group["scale"] / (1 - beta1**step))
    return factor


def _projection(matrix: LowRankMatrix, epoch: int, group: Mapping[str, Any]) -> Tensor:
    generator = torch.Generator(matrix.x.device).manual_seed(group["seed"] + epoch)
    shape, dtype = (matrix.shorter, group["rank"]), compute_dtype(matrix.x)
    basis = torch.randn(shape, generator=generator, dtype=dtype, device=matrix.x.device)
    return basis.div_(math.sqrt(group["rank"]))
