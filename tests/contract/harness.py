"""Run a kind of module with and without savers, and compare everything that could differ."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from helpers import make_trainer
from torch import Tensor, nn

from .kinds import KINDS, build

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
NUM_EPOCHS = 2  # the autoencoder unfreezes its encoder in the second


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind.

    Args:
        losses: Every recorded loss, as Python floats.
        state: A copy of the module's ``state_dict``.
        traces: ``traces(module)`` after the run.
        global_step: The Trainer's count of optimizer steps.

    """

    losses: tuple[float, ...]
    state: dict[str, Tensor]
    traces: dict[str, Any]
    global_step: int


def trainer_for(kind: str, callbacks: Sequence[Any], namespace: str = NAMESPACES[0], **arguments: Any) -> Any:
    """Return a quiet Trainer of a namespace with what the kind asks for."""
    defaults = {"max_epochs": NUM_EPOCHS, **KINDS[kind].trainer}
    return make_trainer(importlib.import_module(namespace), **{**defaults, "callbacks": list(callbacks), **arguments})


def fit(
    kind: str, callbacks: Sequence[Any] = (), *, namespace: str = NAMESPACES[0], place: str = "init", **arguments: Any
) -> tuple[Any, Any]:
    """Train a fresh module of a kind and return ``(module, trainer)``."""
    module = build(kind, namespace, place)
    trainer = trainer_for(kind, callbacks, namespace, **arguments)
    torch.manual_seed(1)
    trainer.fit(module, KINDS[kind].batches())
    return module, trainer


def outcome(module: Any, trainer: Any) -> Outcome:
    """Read what a finished run left behind."""
    return Outcome(
        losses=tuple(module.losses),
        state={k: v.clone() for k, v in module.state_dict().items()},
        traces={**traces(module), **trainer_traces(trainer)},
        global_step=trainer.global_step,
    )


def run(kind: str, callbacks: Sequence[Any] = (), **arguments: Any) -> Outcome:
    """Train a fresh module of a kind and return what the run left behind."""
    return outcome(*fit(kind, callbacks, **arguments))


@cache
def plain(kind: str, namespace: str = NAMESPACES[0], place: str = "init") -> Outcome:
    """Return the run without any saver."""
    return run(kind, namespace=namespace, place=place)


def traces(module: nn.Module) -> dict[str, Any]:
    """Return everything a method could leave on a module: attributes, hooks, classes, types of parameters.

    Values are left out on purpose, ``assert_equal`` compares those.
    """
    found: dict[str, Any] = {}
    for name, submodule in module.named_modules():
        values = vars(submodule)
        found[name] = {
            "class": type(submodule).__qualname__,
            "attributes": sorted(values),
            "hooks": {k: len(v) for k, v in values.items() if k.endswith("_hooks") and v},
            "parameters": {
                k: (type(p).__name__, p.dtype, tuple(p.shape), p.requires_grad, len(p._backward_hooks or ()))
                for k, p in submodule.named_parameters(recurse=False, remove_duplicate=False)
            },
        }
    return found


def trainer_traces(trainer: Any) -> dict[str, Any]:
    """Return the attributes of the Trainer, its strategy and its loops, where hooks could be left."""
    loop = trainer.fit_loop
    things = {
        "trainer": trainer,
        "strategy": trainer.strategy,
        "precision": trainer.strategy.precision_plugin,
        "fit_loop": loop,
        "epoch_loop": loop.epoch_loop,
        "automatic_optimization": loop.epoch_loop.automatic_optimization,
    }
    # the ended session stays: its filter of checkpoints serves `trainer.save_checkpoint` after the run
    found = {f"<{name}>": sorted(vars(thing)) for name, thing in things.items()}
    found["<trainer>"] = [name for name in found["<trainer>"] if name != "_memsave"]
    return found


def assert_equal(actual: Outcome, expected: Outcome) -> None:
    """Assert that two runs are equal bit by bit, and that the first left nothing behind."""
    assert actual.losses == expected.losses
    assert actual.global_step == expected.global_step
    assert_same_state(actual.state, expected.state)
    assert actual.traces == expected.traces


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two state dicts have the same keys in the same order, and the same bits."""
    assert list(actual) == list(expected)
    different = [k for k in expected if not _same_bits(actual[k], expected[k])]
    assert not different, f"not bitwise equal: {different}"


def _same_bits(a: Any, b: Any) -> bool:
    if not isinstance(b, Tensor):
        return bool(a == b)
    return a.dtype == b.dtype and torch.equal(a, b)
