"""How each method of the catalog is asked for in the contract, and what is expected of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

import lightning_memsave
from lightning_memsave import Applied, ModelTransform, Stage
from lightning_memsave.planner.catalog import CATALOG, method
from lightning_memsave.planner.compatibility import cell, pair_problem

from .kinds import KINDS

# Refuses a module in which nothing is frozen; of the kinds, only the autoencoder has a frozen part.
NEEDS_FROZEN_PARTS = ("AdapterCheckpoint",)
METHODS = tuple(row.name for row in CATALOG if row.slot == "callbacks" and row.name not in NEEDS_FROZEN_PARTS)
EXACT = tuple(name for name in METHODS if method(name).numerics == "exact")
OTHERS = tuple(name for name in METHODS if name not in EXACT)
EXACT_UNDER_DDP = tuple(name for name in EXACT if cell(name, "ddp")[0] != "no")
ADAPTERS = ("LoRA", "QLoRA")

# (method, kind) -> what the refusal must say
REFUSED: dict[tuple[str, str], str] = {
    ("GradientRelease", "line_search"): "LBFGS.*evaluates the closure several times",
    **{("GradientRelease", kind): "optimizes manually" for kind in ("manual", "gan", "retain_graph", "several_steps")},
    ("OptimizerOffload", "line_search"): "LBFGS.*evaluates the closure several times",
    ("LowMemoryOptimizer", "line_search"): "LBFGS.*evaluates the closure several times",
    **{
        ("ChunkedLoss", kind): "found no output head"
        for kind in ("tabular", "forecasting", "vision", "autoencoder", "diffusion", "graph", "mapping", "line_search")
        + ("physics", "manual", "gan", "retain_graph", "several_steps", "hf_bert")
    },
    **{
        ("AttentionKernel", kind): "called no scaled_dot_product_attention"
        for kind in ("tabular", "forecasting", "vision", "autoencoder", "diffusion", "graph", "mapping", "line_search")
        + ("physics", "manual", "gan", "retain_graph", "several_steps")
    },
    ("WeightQuantization", "vision"): "no layer this can work on",  # convolutions
    ("QLoRA", "vision"): "found no linear layer",
    ("WeightQuantization", "autoencoder"): "decoder.0.0 trains",
    **{
        ("WeightQuantization", kind): "no trainable parameter left"
        for kind in ("diffusion", "mapping", "line_search", "manual", "retain_graph", "several_steps")
    },
}


def combinations(names: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Return every ``(method, kind)`` that is not refused."""
    return [(name, kind) for name in names for kind in kinds if (name, kind) not in REFUSED]


def make(name: str, kind: str) -> Any:
    """Return a method as the contract asks for it on a kind of module."""
    arguments = dict(method(name).init_args)
    if name in ("LoRA", "QLoRA", "WeightQuantization"):
        arguments["modules"] = list(KINDS[kind].layers or KINDS[kind].blocks)
    elif name in ("ActivationCheckpointing", "SavedActivationPrecision"):
        arguments["modules"] = list(KINDS[kind].blocks)
    elif name == "ActivationOffloading":
        arguments = {"modules": list(KINDS[kind].blocks), "device": tempfile.gettempdir(), "min_bytes": 1}
    return getattr(lightning_memsave, name)(**arguments)


def exact_set(kind: str, beside: str = "") -> list[Any]:
    """Return every exact method at once, those that the table refuses beside another left out."""
    return [make(name, kind) for name in EXACT if (name, kind) not in REFUSED and pair_problem(name, beside) is None]


class Counted(ModelTransform):
    """A user's own transform: counts the calls of the blocks it is given and how often it was applied."""

    stage = Stage.KERNEL
    applied: ClassVar[list[str]] = []
    called: ClassVar[list[str]] = []

    def __init__(self, modules: Sequence[str] = ("*",), name: str = "") -> None:
        self.modules, self.name = modules, name

    def apply(self, module: nn.Module) -> Applied:
        from lightning_memsave._match import match_modules

        found = match_modules(module, tuple(self.modules), subject="Counted")
        hooks = [block.register_forward_pre_hook(_note_call) for _, block in found]
        Counted.applied.append(self.name)

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return Applied(summary=f"count {len(found)} modules", num_modules=len(found), undo=undo)


def _note_call(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    Counted.called.append(type(module).__name__)


class Seed(ModelTransform):
    """Seed torch when the pass begins: a model built later has drawn more random numbers by then."""

    stage = Stage.KERNEL - 9

    def __init__(self) -> None:
        self.seed = 3

    def apply(self, module: nn.Module) -> Applied:
        torch.manual_seed(self.seed)
        return Applied(summary="seed", num_modules=1)


class Early(Counted):
    """The same, one stage earlier than the others."""

    stage = Stage.KERNEL - 5


class Late(Counted):
    """The same, after checkpointing."""

    stage = Stage.OFFLOAD


class Persistent(Counted):
    """A change that outlives the run, as adapters do."""

    stage = Stage.ADAPT

    def apply(self, module: nn.Module) -> Applied:
        applied = super().apply(module)
        return Applied(summary=applied.summary, num_modules=1, undo=applied.undo, persistent=True)
