"""Every optimizer name: one row each, and the questions asked of all rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from lightning_memsave.optim import _rows_bitsandbytes, _rows_own
from lightning_memsave.optim._option_values import option_problems
from lightning_memsave.optim._row import Family, OptimizerRow, family_of, with_tuples

__all__ = ["OPTIMIZERS", "Family", "OptimizerRow", "family_of", "group_options", "name_problems", "option_problems"]

OPTIMIZERS: dict[str, OptimizerRow] = {row.name: row for row in (*_rows_bitsandbytes.ROWS, *_rows_own.ROWS)}

_CONSTRUCTOR_ONLY = ("correction", "min_8bit_size")


def group_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that live in param groups, so that they override what a group had."""
    return {key: value for key, value in with_tuples(options).items() if key not in _CONSTRUCTOR_ONLY}


def name_problems(name: object) -> list[str]:
    """Return what is wrong with an optimizer name: nothing, or one sentence with the nearest ones."""
    if name in OPTIMIZERS:
        return []
    near = difflib.get_close_matches(str(name), OPTIMIZERS, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(map(repr, near))}. " if near else ""
    return [f"name={name!r} is not an optimizer this version knows. {hint}All: {', '.join(map(repr, OPTIMIZERS))}."]
