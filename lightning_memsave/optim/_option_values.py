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


def _is_count(value: object, low: int) -> bool:
    return _is_number(value, low) and isinstance(value, int)


def _are_numbers(value: object, count: int, high: float = math.inf) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(_is_number(v, 0.0, high) for v in value)


Rule = tuple[Callable[[Any], bool], str]
_SWITCH: Rule = (lambda v: isinstance(v, bool), "true or false")
_TWO_EPS: Rule = (lambda v: _are_numbers(v, 2), "two numbers from 0, e.g. (1e-30, 1e-3)")

# option -> what a value must be, and how to say it
_VALUES: dict[str, Rule] = {
    "adjust_lr_fn": (lambda v: v in ("match_rms_adamw", "original"), "'match_rms_adamw' or 'original'"),
    "beta1": (lambda v: v is None or _is_number(v, 0.0, 1.0), "a number from 0 to below 1, or null for none"),
    "betas": (lambda v: _are_numbers(v, 2, 1.0), "two numbers from 0 to below 1, e.g. (0.9, 0.95)"),
    "clip_threshold": (lambda v: _is_number(v, 1e-12), "a number above 0, e.g. 1.0"),
    "correction": (lambda v: v in ("int8", "int16"), "'int8' or 'int16'"),
    "decay_rate": (lambda v: _is_number(v, -math.inf, 1e-12), "a number up to 0, e.g. -0.8"),
    "eps": (lambda v: _is_number(v, 0.0), "a number from 0, e.g. 1e-8"),
    "min_8bit_size": (lambda v: _is_count(v, 0), "a number of elements, e.g. 4096"),
    "momentum": (lambda v: _is_number(v, 0.0, 1.0), "a number from 0 to below 1, e.g. 0.95"),
    "nesterov": _SWITCH,
    "ns_steps": (lambda v: _is_count(v, 1), "a number of iterations, e.g. 5"),
    "per_channel": _SWITCH,
    "rank": (lambda v: _is_count(v, 1), "a number from 1, e.g. 128"),
    "scale": (lambda v: _is_number(v, 1e-12), "a number above 0, e.g. 0.25"),
    "scale_parameter": _SWITCH,
    "seed": (lambda v: _is_count(v, 0), "a number from 0"),
    "update_proj_gap": (lambda v: _is_count(v, 1), "a number of steps, e.g. 200"),
    "weight_decay": (lambda v: _is_number(v, 0.0), "a number from 0"),
}
# (family, option) -> the same, where it differs
_OWN_VALUES: dict[tuple[str, str], Rule] = {
    ("adafactor", "eps"): _TWO_EPS,
    ("came", "eps"): _TWO_EPS,
    ("came", "betas"): (
        lambda v: _are_numbers(v, 3, 1.0),
        "three numbers from 0 to below 1, e.g. (0.9, 0.999, 0.9999)",
    ),
}


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
            accepts, text = _OWN_VALUES.get((row.family, key)) or _VALUES[key]
            if not accepts(value):
                problems.append(f"options={{{key!r}: {value!r}}}: {row.name} takes {text}.")
    return problems
