"""Optimizers and settings that cannot be replaced without silently changing what the user asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_memsave.optim.registry import OptimizerRow

__all__ = ["packed_weight_problems", "refusals", "sparse_problems"]

# class name -> why it is not replaced
_BY_NAME = {
    "LBFGS": "it evaluates the closure several times in a step and keeps a history of directions, not per-value state",
    "SparseAdam": "it works on sparse gradients, which no low-memory optimizer reads",
    "ZeroRedundancyOptimizer": "its state is already split over the ranks; build it over the low-memory class instead",
}
_GROUP_STATE = ("schedulefree", "prodigy", "dadapt")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refusals(old: Optimizer, row: OptimizerRow) -> list[str]:
    """Return one sentence for every reason not to replace ``old``; what was found and what to write instead."""
    problems = _class_problems(old)
    for index, group in enumerate(old.param_groups):
        problems += _group_problems(index, group, row)
        problems += [
            f"param group {index} has a key {key!r} of its own, which {row.name} would read as its option. "
            f"Rename it, or remove it and write options={{{key!r}: ...}}."
            for key in sorted(set(row.options) & set(group) - set(old.defaults) - {"weight_decay"})
        ]
    parameters: list[Tensor] = [p for group in old.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) for p in parameters) and not row.local_shards:
        problems.append(
            f"{row.name} steps on whole tensors, and the parameters are sharded (DTensor): a rank has a part of each. "
            "Use one that steps on shards, e.g. LowMemoryOptimizer('adamw_8bit'), or torch.optim.AdamW."
        )
    taken = _FLOATS if row.library == "bitsandbytes" else (*_FLOATS, torch.float64)
    wrong = sorted({str(p.dtype) for p in parameters if p.requires_grad and p.dtype not in taken})
    if wrong:
        problems.append(
            f"{row.name} updates float32, bfloat16 and float16 parameters; found {', '.join(wrong)}. "
            "Train in one of those, or keep your optimizer."
        )
    return problems


def sparse_problems(module: nn.Module, optimizers: Iterable[Optimizer], row: OptimizerRow) -> list[str]:
    """Return one sentence for every embedding that makes sparse gradients for one of the optimizers."""
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [
        f"{name} makes sparse gradients, which {row.name} does not read. Write sparse=False."
        for name, m in module.named_modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse and id(m.weight) in stepped
    ]


def packed_weight_problems(configured: Any) -> list[str]:
    """Return one sentence for every LBFGS that was given weights which are not numbers to move.

    Others skip what has no gradient; LBFGS gathers all it was given into one vector.

    Args:
        configured: What ``configure_optimizers`` returned.

    """
    if isinstance(configured, Mapping):
        return [problem for value in configured.values() for problem in packed_weight_problems(value)]
    if isinstance(configured, (list, tuple)):
        return [problem for value in configured for problem in packed_weight_problems(value)]
    if not isinstance(configured, torch.optim.LBFGS):
        return []
    parameters = [p for group in configured.param_groups for p in group["params"]]
    packed = sum(not p.is_floating_point() for p in parameters)
    if not packed:
        return []
    return [
        f"{type(configured).__name__} was given {packed} quantized weights among its {len(parameters)} parameters, and "
        "it moves all of them as one vector. Give it those that train: "
        "torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad])."
    ]


def _class_problems(old: Optimizer) -> list[str]:
    name = type(old).__name__
    found = next((cls.__name__ for cls in type(old).__mro__ if cls.__name__ in _BY_NAME), None)
    if found is not None:
        return [f"{name} cannot be replaced: {_BY_NAME[found]}. Remove LowMemoryOptimizer from the callbacks."]
    if name.lower().replace("_", "").startswith(_GROUP_STATE) or "schedulefree" in name.lower():
        return [
            f"{name} cannot be replaced: it adapts the learning rate with state of its own, which would be lost. "
            "Remove LowMemoryOptimizer, or return AdamW with a scheduler from configure_optimizers."
        ]
    closure = inspect.signature(old.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return [
            f"{name} cannot be replaced: its step needs a closure to evaluate the loss again. "
            "Remove LowMemoryOptimizer from the callbacks."
        ]
    return []


def _group_problems(index: int, group: dict[str, object], row: OptimizerRow) -> list[str]:
    problems = []
    where = f"param group {index}"
    lr = group.get("lr")
    if lr is None:
        problems.append(f"{where} has lr=None (an optimizer that sets it itself). Give it a learning rate.")
    elif isinstance(lr, Tensor) and row.library == "bitsandbytes":
        problems.append(f"{where} has a tensor as lr, and {row.name} takes a float. Write lr=float(...).")
    if group.get("amsgrad"):
        problems.append(f"{where} asks for amsgrad=True, which {row.name} does not have. Write amsgrad=False.")
    if group.get("maximize") and not row.maximizes:
        problems.append(f"{where} asks for maximize=True, which {row.name} does not have. Minimize the negative loss.")
    if group.get("differentiable"):
        problems.append(f"{where} asks for differentiable=True, which {row.name} does not have. Keep your optimizer.")
    return problems
