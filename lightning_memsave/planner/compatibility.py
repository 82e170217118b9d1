"""Which methods work together, and on which strategy: one table that everybody reads.

The runtime check, ``memsave doctor``, the docs and the contract tests all read ``METHOD_PAIRS`` and
``METHOD_STRATEGIES``. A pair that is not listed works. Every listed cell has a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_memsave.errors import IncompatibleMethodsError

__all__ = ["METHOD_PAIRS", "METHOD_STRATEGIES", "STRATEGIES", "check_methods", "pair_problem", "partners_refused"]

STRATEGIES = ("single", "ddp", "ddp_spawn", "fsdp1", "fsdp2", "deepspeed")

# two methods -> why they cannot run together and what to write instead
METHOD_PAIRS: dict[frozenset[str], str] = {
    frozenset({"QLoRA", "LoRA"}): "QLoRA already adds adapters. Keep QLoRA(rank=...) and drop LoRA.",
    frozenset({"QLoRA", "WeightQuantization"}): (
        "QLoRA already quantizes the weights. Keep QLoRA(kind=...), or use WeightQuantization together with LoRA."
    ),
}

# (method, strategy) -> why it is refused and what to write instead
_ONE_DTYPE = (
    "FSDP1 flattens the parameters of a block into one tensor of one dtype, and packed weights are bytes. "
    'Use strategy="ddp".'
)
_PACKED_ZERO = 'DeepSpeed partitions and casts what it takes for floating weights. Use strategy="ddp".'
METHOD_STRATEGIES: dict[tuple[str, str], str] = {
    ("WeightQuantization", "fsdp1"): _ONE_DTYPE,
    ("QLoRA", "fsdp1"): _ONE_DTYPE,
    ("LoRA", "fsdp1"): (
        "FSDP1 keeps gradients for the frozen weights that share a flat tensor with an adapter, so nothing is saved. "
        'Use strategy="ddp".'
    ),
    ("AdapterCheckpoint", "fsdp1"): (
        "FSDP1 gathers and writes whole flat tensors, frozen weights included. "
        'Drop AdapterCheckpoint, or use strategy="ddp".'
    ),
    ("WeightQuantization", "deepspeed"): _PACKED_ZERO,
    ("QLoRA", "deepspeed"): _PACKED_ZERO,
    ("AdapterCheckpoint", "deepspeed"): (
        "DeepSpeed writes its own checkpoints. "
        "Drop AdapterCheckpoint and pass DeepSpeedStrategy(exclude_frozen_parameters=True)."
    ),
}


def pair_problem(first: str, second: str) -> str | None:
    """Return why two methods cannot run together, or ``None`` where they can.

    Example:
        >>> pair_problem("ActivationCheckpointing", "QLoRA") is None
        True

    """
    return METHOD_PAIRS.get(frozenset({first, second}))


def partners_refused(method: str) -> dict[str, str]:
    """Return the methods that cannot run beside one, with the reason.

    Example:
        >>> list(partners_refused("WeightQuantization"))
        ['QLoRA']

    """
    return {next(iter(pair - {method})): reason for pair, reason in METHOD_PAIRS.items() if method in pair}


def check_methods(methods: Mapping[str, Any] | Iterable[str], strategy: str) -> None:
    """Refuse methods that cannot run together, or not on this strategy, listing every problem.

    Args:
        methods: Names of the public classes in use.
        strategy: One of ``STRATEGIES``, or ``"other"`` for a strategy this package does not know.

    Raises:
        IncompatibleMethodsError: If the table refuses a pair or a cell.

    Example:
        >>> check_methods(["ActivationCheckpointing", "QLoRA"], "ddp")

    """
    names = set(methods)
    problems = [
        f"{' and '.join(sorted(pair))} do not combine: {reason}"
        for pair, reason in METHOD_PAIRS.items()
        if pair <= names
    ]
    problems += [
        f"{method} does not run on the {kind!r} strategy: {reason}"
        for (method, kind), reason in METHOD_STRATEGIES.items()
        if kind == strategy and method in names
    ]
    if problems:
        raise IncompatibleMethodsError("\n".join(problems))
