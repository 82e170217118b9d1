"""Muon: steps along an orthogonalized momentum for matrices, AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._adamw_rule import adamw_state, adamw_state_bytes, adamw_update
from lightning_memsave.optim.per_parameter import PerParameterOptimizer, compute_dtype, flat_blocks

__all__ = ["Muon", "muon_state_bytes", "orthogonalized"]

# of the quintic that drives singular values towards 1; Jordan et al. 2024
_A, _B, _C = 3.4445, -4.7750, 2.0315


def muon_state_bytes(p: Tensor, by_adamw: bool) -> int:
    """Return ``4 * numel`` for a matrix, ``8 * numel`` for what AdamW steps."""
    return adamw_state_bytes(p) if by_adamw or p.ndim < 2 else p.numel() * compute_dtype(p).itemsize


class Muon(PerParameterOptimizer):
    """Step matrices along their orthogonalized momentum, and everything else by AdamW.

    Vectors, and the parameters named in ``keep_32bit`` (embeddings, norms, heads), go to AdamW, in the same groups. A
    3-D tensor is a stack of matrices (experts); one of more dimensions is a kernel, flattened to a matrix.

    **Saves** 4 of the 8 bytes a value of AdamW, for matrices.
    **Costs** ``2 * num_steps * (2 * R * R * C + R * R * R)`` operations a step and matrix, ``R`` its shorter side: one
    matrix product of the size of a layer with a few hundred tokens. Temporaries are not bounded by a block: three
    fp32 copies of the largest matrix, and three ``R * R``.
    **Numerics** are statistical: another rule than AdamW. With ``adjust_lr_fn="match_rms_adamw"`` a step has the size
    of AdamW's, so that its learning rate and weight decay can stay.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups.
        lr: Of both rules.
        betas: Of AdamW.
        eps: Of AdamW.
        momentum: Of Muon.
        nesterov: Look one step ahead.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: ``"match_rms_adamw"`` (0.2 * sqrt(longer side)) or ``"original"`` (sqrt(max(1, rows / columns))).
        weight_decay: Decoupled: weights shrink by ``lr * weight_decay`` of themselves in a step, whatever the shape.
        keep_32bit: ``id`` of the parameters that go to AdamW besides vectors.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(4))
        >>> weight.grad = torch.eye(4)
        >>> Muon([weight], lr=0.1, weight_decay=0.0).step()
        >>> bool(weight[0, 0] < 1)
        True

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the size of a step: Liu et al. 2025,
        https://arxiv.org/abs/2502.16982, section 2.2.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        weight_decay: float = 0.01,
        keep_32bit: Collection[int] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, keep_32bit)

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return a momentum, or the moments of AdamW."""
        if p.ndim < 2 or self.keeps_32bit(p):
            return {**adamw_state(p, device)}
        return {"momentum_buffer": torch.zeros(p.shape, dtype=compute_dtype(p), device=device)}

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step one tensor by the rule its state was made for."""
        if "momentum_buffer" not in state:
            adamw_update(p, gradient, state, group)
            return
        shape = p.shape if p.ndim <= 3 else (p.shape[0], -1)
        weights, gradient, average = (t.view(shape) for t in (p, gradient, state["momentum_buffer"]))
        average.lerp_(gradient.to(average.dtype), 1 - group["momentum"])
        target = gradient.to(average.dtype).lerp(average, group["momentum"]) if group["nesterov"] else average
        step = orthogonalized(target, group["ns_steps"]).view(-1)
        lr = float(group["lr"])
        size = lr * _size(group["adjust_lr_fn"], weights.shape[-2], weights.shape[-1])
        flat = weights.view(-1)
        for block in flat_blocks(p):
            piece = flat[block]
            new = piece.to(average.dtype).mul(1 - lr * group["weight_decay"])
            piece.copy_(new.sub_(step[block].to(average.dtype), alpha=size))


def _size(adjust_lr_fn: str, rows: int, columns: int) -> float:
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalized(x: Tensor, num_steps: int) -> Tensor:
    """Return matrices with the singular vectors of ``x`` and singular values between about 0.7 and 1.2.

    Args:
        x: ``(..., rows, columns)``.
        num_steps: Of the Newton-Schulz iteration.

    Returns:
        A contiguous tensor: bf16 on an accelerator, the dtype of ``x`` on the CPU, where bf16 products are slow.

    """
    tall = x.shape[-2] > x.shape[-1]
    y = x if x.device.type == "cpu" else x.to(torch.bfloat16)
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-7)
    for _ in range(num_steps):
        gram = y @ y.mT
        y = (
            torch.baddbmm(y, _polynomial(gram), y, beta=_A)
            if y.ndim == 3
            else torch.addmm(y, _polynomial(gram), y, beta=_A)
        )
    return (y.mT if tall else y).contiguous()


def _polynomial(gram: Tensor) -> Tensor:
    function = torch.baddbmm if gram.ndim == 3 else torch.addmm
    return function(gram, gram, gram, beta=_B, alpha=_C)
