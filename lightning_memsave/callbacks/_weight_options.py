"""What the arguments of WeightQuantization, LoRA and QLoRA may be, and what the mechanisms below get."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch

from lightning_memsave._match import Patterns
from lightning_memsave.transforms.adapters import Adapters
from lightning_memsave.transforms.quantization import KINDS, Quantization

__all__ = [
    "adapter_problems",
    "adapter_settings",
    "choice_problems",
    "kind_problems",
    "pattern_problems",
    "quantization_settings",
]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choice_problems(name: str, value: Any, allowed: Sequence[str | None]) -> list[str]:
    """Return what is wrong with a choice; names the nearest ones.

    Example:
        >>> choice_problems("kind", "nf5", ["nf4", "fp4"])
        ["kind='nf5' is not one of 'nf4', 'fp4'; did you mean 'nf4'?"]

    """
    if value in allowed:
        return []
    near = difflib.get_close_matches(str(value).lower(), [a for a in allowed if a is not None], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return [f"{name}={value!r} is not one of {', '.join(repr(a) for a in allowed)}{hint}"]


def kind_problems(kind: Any) -> list[str]:
    """Return what is wrong with a kind of quantization."""
    return choice_problems("kind", kind, KINDS)


def pattern_problems(name: str, value: Any, *, auto: bool = False) -> list[str]:
    """Return what is wrong with a selection of modules; an empty one selects nothing, which only ``auto`` forbids."""
    patterns = (value,) if isinstance(value, str) else value
    listed = isinstance(patterns, (list, tuple, set, frozenset)) and all(isinstance(p, str) and p for p in patterns)
    if not listed or (auto and not patterns):
        first = '"auto", ' if auto else ""
        return [
            f'{name}={value!r} selects nothing. Write {first}a glob ("net.blocks.*"), a class name, or a list of them.'
        ]
    if "auto" in patterns and (not auto or len(patterns) > 1):
        return [f'{name}={value!r}: "auto" stands alone, and only for modules=.']
    return []


def adapter_problems(rank: Any, alpha: Any, dropout: Any, modules: Any, train: Any, frozen_dtype: Any) -> list[str]:
    """Return what is wrong with the arguments that LoRA and QLoRA share."""
    problems = []
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(f"rank={rank!r} must be an int of at least 1.")
    if alpha is not None and not (isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and alpha > 0):
        problems.append(f"alpha={alpha!r} must be a positive number, or None for 2 * rank.")
    if not (isinstance(dropout, (int, float)) and not isinstance(dropout, bool) and 0 <= dropout < 1):
        problems.append(f"dropout={dropout!r} must be a probability: at least 0, below 1.")
    problems += pattern_problems("modules", modules, auto=True) + pattern_problems("train", train)
    return problems + choice_problems("frozen_dtype", frozen_dtype, ("bf16", "fp16", None))


def _as_tuple(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def quantization_settings(
    subject: str,
    kind: str,
    *,
    modules: Patterns = "auto",
    skip: Patterns = (),
    train: Patterns = (),
    double_quant: bool = True,
    compute_dtype: str | None = None,
) -> Quantization:
    """Return what ``quantize_weights`` takes."""
    return Quantization(
        kind=kind,
        modules=_as_tuple(modules),
        skip=_as_tuple(skip),
        train=_as_tuple(train),
        double_quant=double_quant,
        compute_dtype=None if compute_dtype is None else _DTYPES[compute_dtype],
        subject=subject,
    )


def adapter_settings(subject: str, callback: Any, *, variant: str = "lora", adapter_dtype: str = "fp32") -> Adapters:
    """Return what ``add_adapters`` takes, from the attributes that LoRA and QLoRA share."""
    return Adapters(
        rank=callback.rank,
        alpha=2 * callback.rank if callback.alpha is None else callback.alpha,
        dropout=callback.dropout,
        modules=_as_tuple(callback.modules),
        variant=variant,
        train=_as_tuple(callback.train),
        frozen_dtype=None if callback.frozen_dtype is None else _DTYPES[callback.frozen_dtype],
        adapter_dtype=_DTYPES[adapter_dtype],
        subject=subject,
    )
