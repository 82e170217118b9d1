"""AdamW with moments in 4 bits or fp8, on any device and without a compiler."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._adamw_rule import adamw_state, adamw_state_bytes, adamw_update, apply_adamw
from lightning_memsave.optim._codecs import FOUR_BITS, FP8, Codec
from lightning_memsave.optim.per_parameter import PerParameterOptimizer, flat_blocks

__all__ = ["MIN_NARROW_ELEMENTS", "AdamW4bit", "AdamWFp8", "is_narrow", "narrow_state_bytes"]

MIN_NARROW_ELEMENTS = 4096  # smaller tensors keep fp32 moments


def narrow_state_bytes(p: Tensor, keeps_32bit: bool, codec: Codec) -> int:
    """Return the bytes of both moments of a parameter."""
    if not is_narrow(p, keeps_32bit):
        return adamw_state_bytes(p)
    return 2 * codec.state_bytes(p.numel())


def is_narrow(p: Tensor, keeps_32bit: bool) -> bool:
    """Return whether the moments of a parameter are narrower than 32 bits."""
    return not keeps_32bit and p.numel() >= MIN_NARROW_ELEMENTS and p.dtype != torch.float64


class _NarrowAdamW(PerParameterOptimizer):
    codec: Codec

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        keep_32bit: Collection[int] = (),
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, keep_32bit)

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return codes and scales of two moments, or the moments of AdamW."""
        if not is_narrow(p, self.keeps_32bit(p)):
            return {**adamw_state(p, device)}
        return {
            **self.codec.zeros("exp_avg", p.numel(), device),
            **self.codec.zeros("exp_avg_sq", p.numel(), device),
        }

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step some blocks at a time: read the moments, move them, step, write them."""
        if "exp_avg_scale" not in state:
            adamw_update(p, gradient, state, group)
            return
        beta1, beta2 = group["betas"]
        flat, flat_gradient, lr = p.view(-1), gradient.view(-1), float(group["lr"])
        for part in flat_blocks(p):
            g = flat_gradient[part].to(torch.float32)
            first = self.codec.read(state, "exp_avg", part).lerp_(g, 1 - beta1)
            second = self.codec.read(state, "exp_avg_sq", part).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            weights = flat[part].to(torch.float32)
            apply_adamw(weights, first, second, state["step"], lr, group)
            flat[part].copy_(weights)
            self.codec.write(state, "exp_avg", part, first)
            self.codec.write(state, "exp_avg_sq", part, second)


class AdamW4bit(_NarrowAdamW):
    """Step as AdamW does, with moments in 4 bits.

    **Saves** of the 8 bytes a value of AdamW all but ``1 + 8 / 128``; tensors below 4096 values, and the
    parameters named in ``keep_32bit``, keep 8.
    **Costs** the conversion of the moments in every step, in plain torch operations (no compiler). Temporaries are
    at most seven blocks of 2**20 values (2**22 on an accelerator).
    **Numerics** are statistical: AdamW with moments of 16 levels, one scale every 128 values.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups.
        lr: As for AdamW.
        betas: As for AdamW.
        eps: As for AdamW.
        weight_decay: Decoupled, as in AdamW.
        keep_32bit: ``id`` of the parameters with fp32 moments.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> weight.grad = torch.ones(64, 64)
        >>> optimizer = AdamW4bit([weight], lr=0.1)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].nbytes
        2048

    Source:
        Li et al. 2023, https://arxiv.org/abs/2309.01507: block size 128, a dynamic table for the first moment and a
        linear one without zero for the second.

    """

    codec = FOUR_BITS


class AdamWFp8(_NarrowAdamW):
    """Step as AdamW does, with moments in fp8 (e4m3).

    **Saves** of the 8 bytes a value of AdamW all but ``2 + 8 / 256``; tensors below 4096 values, and the parameters
    named in ``keep_32bit``, keep 8.
    **Costs** the conversion of the moments in every step, in plain torch operations on any device. Temporaries are
    at most seven blocks of 2**20 values (2**22 on an accelerator).
    **Numerics** are statistical: AdamW with a relative error of the moments of at most 1/16, one scale every 256
    values. The second moment is stored as its root.
    **Does not combine with** sharded (DTensor) parameters.

    Args:
        params: Parameters or groups.
        lr: As for AdamW.
        betas: As for AdamW.
        eps: As for AdamW.
        weight_decay: Decoupled, as in AdamW.
        keep_32bit: ``id`` of the parameters with fp32 moments.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> weight.grad = torch.ones(64, 64)
        >>> optimizer = AdamWFp8([weight], lr=0.1)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].nbytes
        4096

    Source:
        The format: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433; moments in it: Peng et al. 2023,
        https://arxiv.org/abs/2310.18313.

    """

    codec = FP8
