"""One row per optimizer name: how it is built, what it keeps of the old one, and its bytes of state."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave._imports import require
from lightning_memsave.optim._bitsandbytes import MIN_8BIT_ELEMENTS, block_state_bytes, finish
from lightning_memsave.optim.state_bytes import adafactor_state_bytes

__all__ = ["OPTIMIZERS", "Family", "OptimizerRow", "family_of", "name_problems", "option_problems"]

Family = Literal["adam", "lion", "adafactor", "other"]
Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """One optimizer that ``LowMemoryOptimizer`` can build.

    Args:
        name: The public name, lower snake case, width last.
        title: The class that is built.
        family: Optimizers of one family read the hyper-parameters in ``shared`` in the same way.
        shared: Group keys that keep their value when the old optimizer is of the same family; ``lr`` and
            ``weight_decay`` always do.
        options: What ``options`` may hold.
        build: ``(groups, options, ids of the parameters with 32-bit state) -> optimizer``.
        state_bytes: ``(parameter, keeps 32-bit state, options) -> bytes``.
        shared_bytes: State that exists once, where any tensor has 8-bit state (the quantization tables).
        bits: Width of a state value.
        library: The module that holds the class.
        paged: State of large tensors moves to the host when the accelerator is full.
        maximizes: ``maximize=True`` is honoured.

    """

    name: str
    title: str
    family: Family
    shared: tuple[str, ...]
    options: tuple[str, ...]
    build: Callable[[Sequence[Group], Mapping[str, Any], Collection[int]], Optimizer]
    state_bytes: Callable[[Tensor, bool, Mapping[str, Any]], int]
    shared_bytes: int = 0
    bits: int = 32
    library: Literal["bitsandbytes", "torch"] = "bitsandbytes"
    paged: bool = False
    maximizes: bool = False

    def uses_8bit(self, p: Tensor, keeps_32bit: bool, options: Mapping[str, Any]) -> bool:
        """Return whether the state of ``p`` will be 8-bit."""
        minimum = options.get("min_8bit_size", MIN_8BIT_ELEMENTS)
        return self.bits == 8 and not keeps_32bit and p.numel() >= minimum


def _bitsandbytes_row(name: str, title: str, family: Family, num_moments: int, bits: int, paged: bool) -> OptimizerRow:
    def build(groups: Sequence[Group], options: Mapping[str, Any], keep_32bit: Collection[int]) -> Optimizer:
        library = require("bitsandbytes.optim", f"LowMemoryOptimizer({name!r})")
        optimizer = getattr(library, title)(groups, **_with_tuples(options))
        return finish(optimizer, keep_32bit=keep_32bit, num_moments=num_moments)

    def state_bytes(p: Tensor, keeps_32bit: bool, options: Mapping[str, Any]) -> int:
        if row.uses_8bit(p, keeps_32bit, options):
            return block_state_bytes(p.numel(), num_moments)
        return num_moments * 4 * p.numel()

    row = OptimizerRow(
        name=name,
        title=title,
        family=family,
        shared=("betas", "eps") if family == "adam" else ("betas",),
        options=("betas", "weight_decay")
        + (("eps",) if family == "adam" else ())
        + (("min_8bit_size",) if bits == 8 else ()),
        build=build,
        state_bytes=state_bytes,
        shared_bytes=num_moments * 256 * 4 if bits == 8 else 0,
        bits=bits,
        paged=paged,
    )
    return row


def _build_adafactor(groups: Sequence[Group], options: Mapping[str, Any], keep_32bit: Collection[int]) -> Optimizer:
    return torch.optim.Adafactor(groups, **_with_tuples(options))


_ROWS = (
    _bitsandbytes_row("adamw_8bit", "AdamW8bit", "adam", num_moments=2, bits=8, paged=False),
    _bitsandbytes_row("paged_adamw_8bit", "PagedAdamW8bit", "adam", num_moments=2, bits=8, paged=True),
    _bitsandbytes_row("paged_adamw_32bit", "PagedAdamW32bit", "adam", num_moments=2, bits=32, paged=True),
    _bitsandbytes_row("lion_8bit", "Lion8bit", "lion", num_moments=1, bits=8, paged=False),
    _bitsandbytes_row("lion", "Lion32bit", "lion", num_moments=1, bits=32, paged=False),
    OptimizerRow(
        name="adafactor",
        title="Adafactor",
        family="adafactor",
        shared=("beta2_decay", "eps", "d", "foreach"),
        options=("beta2_decay", "d", "eps", "foreach", "weight_decay"),
        build=_build_adafactor,
        state_bytes=lambda p, _keeps, _options: adafactor_state_bytes(p),
        library="torch",
        maximizes=True,
    ),
)
OPTIMIZERS: dict[str, OptimizerRow] = {row.name: row for row in _ROWS}

_CONSTRUCTOR_ONLY = ("min_8bit_size",)


def group_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that live in param groups, so that they override what a group had."""
    return {key: value for key, value in _with_tuples(options).items() if key not in _CONSTRUCTOR_ONLY}


def _with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    # YAML has lists only
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


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
