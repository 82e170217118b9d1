"""Precision settings that fail late or silently, found before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["loss_scaling_problems", "precision_warnings", "stuck_share"]

_SHOWN = 5
_SAMPLE = 4096  # values looked at in each tensor
_STUCK = 0.5  # share of values that a first step must leave unchanged to be worth a warning


def loss_scaling_problems(
    named_parameters: Iterable[tuple[str, Tensor]], optimizers: Sequence[Optimizer], *, clips: bool
) -> list[str]:
    """Return what makes a run with a loss scaler (``16-mixed``) fail at its first step.

    Args:
        named_parameters: Of the whole module.
        optimizers: Those that will step.
        clips: The Trainer clips gradients.

    """
    problems = []
    half = [name for name, p in named_parameters if p.requires_grad and p.dtype == torch.float16]
    if half:
        more = f" and {len(half) - _SHOWN} more" if len(half) > _SHOWN else ""
        problems.append(
            f"loss scaling cannot unscale fp16 gradients, and {len(half)} trainable parameters are fp16: "
            f"{', '.join(half[:_SHOWN])}{more}. Store them in fp32 before fit (for p in module.parameters(): "
            "p.data = p.data.float() if p.requires_grad else p.data), or use precision='bf16-mixed'."
        )
    fused = sorted({type(o).__name__ for o in optimizers if getattr(o, "_step_supports_amp_scaling", False)})
    if fused and clips:
        problems.append(
            f"gradient clipping with loss scaling does not work with a fused optimizer ({', '.join(fused)}), which "
            "unscales the gradients inside its step. Write fused=False, or use precision='bf16-mixed'."
        )
    return problems


def precision_warnings(optimizers: Sequence[Optimizer], *, keeps_remainders: bool = False) -> list[str]:
    """Return what makes training on 16-bit weights silently wrong: an eps of zero, steps that round to nothing.

    Args:
        optimizers: Those that will step.
        keeps_remainders: What a step rounds away is not lost (``BF16Precision``).

    """
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    found = [warning for optimizer, group in groups for warning in _group_warnings(optimizer, group, keeps_remainders)]
    return list(dict.fromkeys(found))


def _group_warnings(optimizer: Optimizer, group: Mapping[str, Any], keeps_remainders: bool) -> Iterator[str]:
    name = type(optimizer).__name__
    trained = [p for p in group["params"] if p.requires_grad]
    eps = group.get("eps")
    # torch's own optimizers compute in the dtype of the weights; bitsandbytes in fp32
    computes_in_half = type(optimizer).__module__.startswith("torch.") and any(
        p.dtype == torch.float16 for p in trained
    )
    if computes_in_half and isinstance(eps, float) and eps > 0 and _as_half(eps) == 0:
        yield (
            f"{name} computes in fp16 here, where eps={eps:g} underflows to 0, so a zero gradient gives NaN. "
            "Use eps>=1e-6, or precision='bf16-mixed'."
        )
    lr = float(group.get("max_lr") or group.get("initial_lr") or group.get("lr") or 0.0)
    share = stuck_share(trained, lr) if _steps_by_lr(optimizer) and not keeps_remainders else 0.0
    if share > _STUCK:
        yield (
            f"a step of {name} with lr={lr:g} leaves {share:.0%} of the 16-bit weights unchanged: it is smaller than "
            "half their spacing and is rounded away. Use plugins=[BF16Precision()] in place of the precision, "
            "precision='bf16-mixed' (fp32 weights), or a larger lr."
        )


def _steps_by_lr(optimizer: Optimizer) -> bool:
    """Return whether one step moves every value by about the learning rate, whatever the gradient."""
    names = " ".join(cls.__name__ for cls in type(optimizer).__mro__)
    return ("Adam" in names or "Lion" in names) and "SplitMaster" not in names  # which keeps what is rounded away


@torch.no_grad()
def stuck_share(parameters: Sequence[Tensor], lr: float) -> float:
    """Return the share of the 16-bit values that adding ``lr`` does not change, from a sample of each tensor.

    Example:
        >>> stuck_share([torch.ones(8, dtype=torch.bfloat16)], lr=1e-3)
        1.0

    """
    stuck = total = 0.0
    for p in parameters:
        local = p.to_local() if hasattr(p, "to_local") else p
        if p.dtype not in (torch.bfloat16, torch.float16) or local.numel() == 0 or p.is_meta:
            continue
        values = local.detach().reshape(-1)[:: max(1, local.numel() // _SAMPLE)].abs()
        stuck += float(((values.float() + lr).to(p.dtype) == values).float().mean()) * p.numel()
        total += p.numel()
    return stuck / total if total and lr > 0 else 0.0


def _as_half(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32, device="cpu").to(torch.float16))
