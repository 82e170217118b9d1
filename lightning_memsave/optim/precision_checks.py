"""Precision settings that fail late or silently, found before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
            "precision='16-mixed' scales the loss and cannot unscale fp16 gradients, and "
            f"{len(half)} trainable parameters are fp16: {', '.join(half[:_SHOWN])}{more}. Store them in fp32 before fit: "
            "for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data; or use "
            "precision='bf16-mixed'."
        )
    fused = sorted({type(o).__name__ for o in optimizers if getattr(o, "_step_supports_amp_scaling", False)})
    if fused and clips:
        problems.append(
            f"gradient clipping under precision='16-mixed' does not work with a fused optimizer ({', '.join(fused)}), "
            "which unscales the gradients inside its step. Write fused=False, or use precision='bf16-mixed'."
        )
    return problems


def precision_warnings(optimizers: Sequence[Optimizer]) -> list[str]:
    """Return what makes training on 16-bit weights silently wrong: an eps of zero, steps that round to nothing."""
    warnings = []
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for group in optimizer.param_groups:
            trained = [p for p in group["params"] if p.requires_grad]
            eps = group.get("eps")
            half = any(p.dtype == torch.float16 for p in trained)
            in_weight_dtype = type(optimizer).__module__.startswith("torch.optim")
            if half and in_weight_dtype and isinstance(eps, float) and eps > 0 and _as_half(eps) == 0:
                warnings.append(
                    f"{name} computes in fp16 here and eps={eps:g} is 0 in fp16, so a zero gradient gives NaN. "
                    "Write eps=1e-6 or larger, or use precision='bf16-mixed'."
                )
            lr = float(group.get("max_lr") or group.get("initial_lr") or group.get("lr") or 0.0)
            share = stuck_share(trained, lr) if family_steps_by_lr(optimizer) else 0.0
            if share > _STUCK:
                warnings.append(
                    f"a step of {name} with lr={lr:g} leaves {share:.0%} of the 16-bit weights unchanged: it is smaller "
                    "than half their spacing and is rounded away. Use precision='bf16-mixed' (fp32 weights), or a larger "
                    "learning rate."
                )
    return list(dict.fromkeys(warnings))


def family_steps_by_lr(optimizer: Optimizer) -> bool:
    """Return whether one step moves every value by about the learning rate, whatever the gradient (Adam, Lion)."""
    names = " ".join(cls.__name__ for cls in type(optimizer).__mro__)
    return "Adam" in names or "Lion" in names


@torch.no_grad()
def stuck_share(parameters: Sequence[Tensor], lr: float) -> float:
    """Return the share of the 16-bit values that adding ``lr`` does not change, from a sample of each tensor."""
    stuck = total = 0.0
    for p in parameters:
        if p.dtype not in (torch.bfloat16, torch.float16) or p.numel() == 0 or p.is_meta:
            continue
        stride = max(1, p.numel() // _SAMPLE)
        values = _local(p).detach().reshape(-1)[::stride]
        moved = (values.abs().float() + lr).to(p.dtype)
        stuck += float((moved == values.abs()).float().mean()) * p.numel() if len(values) else 0.0
        total += p.numel()
    return stuck / total if total and lr > 0 else 0.0


def _local(p: Tensor) -> Tensor:
    local = getattr(p, "to_local", None)
    return local() if callable(local) else p


def _as_half(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32, device="cpu").to(torch.float16))
