"""Every optimizer name: one row each, and the questions asked of all rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_memsave.optim import _rows_bitsandbytes, _rows_own
from lightning_memsave.optim._option_values import option_problems
from lightning_memsave.optim._row import Family, OptimizerRow, with_tuples

__all__ = ["OPTIMIZERS", "Family", "OptimizerRow", "family_of", "group_options", "name_problems", "option_problems"]

OPTIMIZERS: dict[str, OptimizerRow] = {row.name: row for row in (*_rows_bitsandbytes.ROWS, *_rows_own.ROWS)}

_CONSTRUCTOR_ONLY = ("min_8bit_size",)


def group_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that live in param groups, so that they override what a group had."""
    return {key: value for key, value in with_tuples(options).items() if key not in _CONSTRUCTOR_ONLY}


def family_of(optimizer: Optimizer) -> Family:
    """Return which update rule an optimizer follows, by the names of its classes.

    Example:
        >>> family_of(torch.optim.NAdam([torch.zeros(1)]))
        'other'

    """
    for cls in type(optimizer).__mro__:
        name = cls.__name__.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
        if name in ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"):
            return "adam"
        if name == "Lion":
            return "lion"
        if cls is torch.optim.Adafactor:
            return "adafactor"
    return "other"


def name_problems(name: object) -> list[str]:
    """Return what is wrong with an optimizer name: nothing, or one sentence with the nearest ones."""
    if name in OPTIMIZERS:
        return []
    near = difflib.get_close_matches(str(name), OPTIMIZERS, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(map(repr, near))}. " if near else ""
    return [f"name={name!r} is not an optimizer this version knows. {hint}All: {', '.join(map(repr, OPTIMIZERS))}."]
