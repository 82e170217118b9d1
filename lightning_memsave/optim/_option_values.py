"""What an option of an optimizer may be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_memsave.optim._row import OptimizerRow

__all__ = ["option_problems"]


def _is_number(value: object, low: float, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high


def _is_pair(value: object, high: float) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(v, 0.0, high) for v in value)


def _is_adafactor_eps(value: object) -> bool:
    if isinstance(value, (list, tuple)) and value and value[0] is None:
        return _is_pair([0.0, *value[1:]], math.inf)
    return _is_pair(value, math.inf)


# option -> what a value must be, and how to say it
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta2_decay": (lambda v: _is_number(v, -math.inf, 1e-12), "a number up to 0, e.g. -0.8"),
    "betas": (lambda v: _is_pair(v, 1.0), "two numbers from 0 to below 1, e.g. (0.9, 0.95)"),
    "d": (lambda v: _is_number(v, 1.0), "a number from 1"),
    "eps": (lambda v: _is_number(v, 0.0), "a number from 0, e.g. 1e-8"),
    "foreach": (lambda v: v is None or isinstance(v, bool), "true, false or null"),
    "min_8bit_size": (lambda v: _is_number(v, 0) and isinstance(v, int), "a number of elements, e.g. 4096"),
    "weight_decay": (lambda v: _is_number(v, 0.0), "a number from 0"),
}
_ADAFACTOR_EPS = (_is_adafactor_eps, "two numbers from 0, the first may be null, e.g. (null, 1e-3)")


def option_problems(row: OptimizerRow, options: Mapping[str, Any]) -> list[str]:
    """Return one sentence for every option the optimizer does not take, or not with that value."""
    problems = []
    for key, value in options.items():
        if key == "lr":
            problems.append(
                "options={'lr': ...}: the learning rates stay those of configure_optimizers and its schedulers; "
                "change them there."
            )
        elif key not in row.options:
            near = difflib.get_close_matches(str(key), row.options, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            problems.append(f"options={{{key!r}: ...}}: {row.name} takes {', '.join(sorted(row.options))}.{hint}")
        else:
            accepts, text = _ADAFACTOR_EPS if (row.family, key) == ("adafactor", "eps") else _VALUES[key]
            if not accepts(value):
                problems.append(f"options={{{key!r}: {value!r}}}: {row.name} takes {text}.")
    return problems
