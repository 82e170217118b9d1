"""Adafactor and AdaLOMO: one second moment a row and a column of a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._factored import factored_state, mean_square, second_moment
from lightning_memsave.optim.per_parameter import PerParameterOptimizer, compute_dtype

__all__ = ["AdaLomo", "Adafactor"]


class Adafactor(PerParameterOptimizer):
    """Step by the gradient over the root of a second moment that is kept as rows and columns.

    **Saves** of the 8 bytes a value of AdamW all but ``4 * (rows + columns)`` bytes a matrix; vectors keep 4 bytes a
    value, and ``beta1`` adds 4 bytes a value.
    **Costs** two more passes over the gradient. Temporaries are at most seven blocks of 2**20 values (2**22 on an
    accelerator), whatever the size of the matrix.
    **Numerics** are statistical: another rule than AdamW. With the defaults it is the rule of Hugging Face's
    ``Trainer(optim="adafactor")``: the learning rate is the size of a step, and is not scaled by that of the weights.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups; the last two dimensions of a tensor are its rows and columns.
        lr: The size of a step: the root mean square of an update is at most ``clip_threshold * lr``.
        eps: Added to the squared gradient; the least size of weights for ``scale_parameter``.
        clip_threshold: Root mean square above which an update is scaled down.
        decay_rate: The second moment forgets with ``1 - step**decay_rate``.
        beta1: Of an average of the updates, or ``None`` for none.
        weight_decay: Decoupled: weights shrink by ``lr * weight_decay`` of themselves in a step.
        scale_parameter: Multiply ``lr`` by the root mean square of the weights, as in the paper and in
            ``torch.optim.Adafactor``.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 4))
        >>> weight.grad = torch.ones(4, 4)
        >>> optimizer = Adafactor([weight], lr=0.1)
        >>> optimizer.step()
        >>> round(weight[0, 0].item(), 6)
        0.9

    Source:
        Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
        }
        super().__init__(params, defaults)

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return rows and columns, or every value of a vector; and a first moment where ``beta1`` asks for it."""
        state = factored_state(p, device)
        if group["beta1"] is not None:
            state["exp_avg"] = torch.zeros(p.shape, dtype=compute_dtype(p), device=device)
        return state

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step one tensor in three passes over its blocks: second moment, size of the update, update."""
        beta2, dtype = 1.0 - state["step"] ** group["decay_rate"], compute_dtype(p)
        moment = second_moment(p, state)
        weights, gradients = moment.shaped(p), moment.shaped(gradient)
        moment.add(beta2, lambda index: gradients[index].to(dtype).square().add_(group["eps"][0]))

        def normalized(index: Any) -> Tensor:
            return moment.normalized(gradients[index].to(dtype), index)

        lr: Tensor | float = float(group["lr"])
        if group["scale_parameter"]:
            size = mean_square((weights[index].to(dtype) for index in moment.blocks()), p.numel()).sqrt_()
            lr = size.clamp_(min=group["eps"][1]).mul_(lr)
        size = mean_square((normalized(index) for index in moment.blocks()), p.numel()).sqrt_()
        scale = lr / size.div_(group["clip_threshold"]).clamp_(min=1.0)
        for index in moment.blocks():
            step = normalized(index).mul_(scale)
            if "exp_avg" in state:
                step = moment.shaped(state["exp_avg"])[index].lerp_(step, 1 - group["beta1"])
            block = weights[index]
            block.copy_(block.to(dtype).mul(1 - lr * group["weight_decay"]).sub_(step))


class AdaLomo(Adafactor):
    """Step by a factored second moment, each step scaled by the size of the weights.

    AdaLOMO is this rule run inside backward: together with ``GradientRelease`` no gradient outlives its layer.

    **Saves** and **Costs** as ``Adafactor`` without ``beta1``.
    **Numerics** are statistical: Adafactor's rule with ``scale_parameter``, which wants learning rates near 1e-3.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups.
        lr: The size of a step as a part of the root mean square of the weights.
        eps: Added to the squared gradient; the least size of weights.
        clip_threshold: Root mean square above which an update is scaled down.
        decay_rate: The second moment forgets with ``1 - step**decay_rate``.
        weight_decay: Decoupled: weights shrink by ``weight_decay`` times the scaled learning rate.

    Example:
        >>> optimizer = AdaLomo([torch.nn.Parameter(torch.ones(2, 2))], lr=5e-4)
        >>> optimizer.param_groups[0]["scale_parameter"]
        True

    Source:
        Lv et al. 2023, https://arxiv.org/abs/2310.10195, algorithm 1.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            lr,
            eps=eps,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            weight_decay=weight_decay,
            scale_parameter=True,
        )
