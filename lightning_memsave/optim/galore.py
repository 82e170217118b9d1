"""GaLore: AdamW in the space of the largest singular vectors of the gradient."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._adamw_rule import adamw_state, adamw_update
from lightning_memsave.optim._low_rank import LowRankMatrix, is_low_rank, matrix_shape
from lightning_memsave.optim.per_parameter import PerParameterOptimizer, compute_dtype

__all__ = ["GaLoreAdamW"]


class GaLoreAdamW(PerParameterOptimizer):
    """Step matrices by Adam on a low-rank projection of their gradient, and everything else by AdamW.

    Vectors, matrices whose shorter side is at most ``rank``, and the parameters named in ``keep_32bit`` (embeddings,
    norms, heads) go to AdamW, in the same groups. A tensor of more than two dimensions is flattened to a matrix.

    **Saves** of the ``8 * rows * columns`` bytes of AdamW all but ``8 * rank * longer + 4 * rank * shorter``.
    **Costs** two thin matrix products a step, and eigenvectors of a ``shorter * shorter`` matrix every
    ``update_proj_gap`` steps (``O(shorter**3)``). Temporaries are at most seven blocks of 2**20 values (2**22 on an
    accelerator), ``4 * rank * longer`` bytes, and ``8 * shorter**2`` while the projection is made.
    **Numerics** are statistical: the part of a gradient outside the projection is dropped, and a step is ``scale``
    times that of AdamW, so that larger learning rates are usual.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups.
        lr: Of both rules.
        betas: As for AdamW.
        eps: As for AdamW.
        rank: Of the projection.
        update_proj_gap: Steps between two projections.
        scale: Of a step of the projected matrices.
        weight_decay: Decoupled, as in AdamW, and not scaled.
        keep_32bit: ``id`` of the parameters that go to AdamW besides vectors.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> weight.grad = torch.ones(8, 6)
        >>> optimizer = GaLoreAdamW([weight], lr=0.1, rank=2)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([8, 2])

    Source:
        Zhao et al. 2024, https://arxiv.org/abs/2403.03507, algorithm 2.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        weight_decay: float = 0.01,
        keep_32bit: Collection[int] = (),
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        super().__init__(params, {**defaults, **projection}, keep_32bit)

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return a basis and two thin moments, or the moments of AdamW."""
        rank, dtype = group["rank"], compute_dtype(p)
        if not is_low_rank(p, rank, self.keeps_32bit(p)):
            return {**adamw_state(p, device)}
        shape = matrix_shape(p)
        sizes = {"exp_avg": max(shape), "exp_avg_sq": max(shape), "projection": min(shape)}
        return {name: torch.zeros((size, rank), dtype=dtype, device=device) for name, size in sizes.items()}

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step one tensor by the rule its state was made for."""
        if "projection" not in state:
            adamw_update(p, gradient, state, group)
            return
        beta1, beta2 = group["betas"]
        step, lr, basis = state["step"], float(group["lr"]), state["projection"]
        matrix, weights = LowRankMatrix(gradient), LowRankMatrix(p)
        if (step - 1) % group["update_proj_gap"] == 0:
            # the singular vectors of the gradient, from a matrix of its shorter side; ascending order
            basis.copy_(torch.linalg.eigh(matrix.gram())[1][:, -basis.shape[1] :])
        low = matrix.project(basis)
        first, second = state["exp_avg"].lerp_(low, 1 - beta1), state["exp_avg_sq"].mul_(beta2)
        second.addcmul_(low, low, value=1 - beta2)
        torch.sqrt(second, out=low).div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        low = torch.div(first, low, out=low)
        size = lr * group["scale"] / (1 - beta1**step)
        for block in weights.row_blocks():
            new = weights.rows(block).mul(1 - lr * group["weight_decay"])
            weights.x[block].copy_(new.sub_(matrix.back(low, basis, block), alpha=size))
