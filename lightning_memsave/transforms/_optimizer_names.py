"""Give an optimizer's saved state back by parameter name; torch alone goes by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.transforms._checkpoint_state import canonical

__all__ = ["Names", "by_name", "group_names", "keyed_by_name"]

Names = list[list[str]]  # per group, the canonical names of its parameters


def group_names(module: nn.Module, optimizer: Optimizer) -> Names | None:
    """Return the parameter names of every group, or ``None`` if the optimizer holds a tensor the module does not."""
    names = {id(p): canonical(n) for n, p in module.named_parameters()}
    groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if any(name is None for group in groups for name in group):
        return None
    return [[name for name in group if name is not None] for group in groups]


def by_name(
    state: Mapping[str, Any], saved: Sequence[Sequence[str]], here: Sequence[Sequence[str]], *, regroup: bool
) -> dict[str, Any]:
    """Reorder an optimizer's saved state dict so that loading it by position is loading it by name.

    Args:
        state: ``optimizer.state_dict()`` as saved; tensors are not copied.
        saved: The names of its groups when it was saved.
        here: The names of the groups it is loaded into.
        regroup: Groups may also stand in another order (schedulers keep a list of rates per group, so not with them).

    Raises:
        CheckpointMismatchError: If the parameters differ, or are divided into groups in another way.

    """
    if [list(g) for g in saved] == [list(g) for g in here]:
        return dict(state)
    before, now = {n for g in saved for n in g}, {n for g in here for n in g}
    if before != now:
        lacks, extra = sorted(now - before), sorted(before - now)
        found = [f"{len(lacks)} it has no state for (first: {', '.join(lacks[:3])})"] if lacks else []
        found += [f"{len(extra)} that are not optimized any more (first: {', '.join(extra[:3])})"] if extra else []
        raise CheckpointMismatchError(
            f"The optimizer state was saved for {len(before)} parameters and the optimizer now has {len(now)}: "
            f"{' and '.join(found)}. Make the same parameters trainable as in the run that saved it."
        )
    positions = [_position(group, saved) for group in here]
    if any(p is None for p in positions) or (
        positions != sorted(p for p in positions if p is not None) and not regroup
    ):
        raise CheckpointMismatchError(
            f"The optimizer state was saved in parameter groups of {[len(g) for g in saved]} parameters and is loaded "
            f"into groups of {[len(g) for g in here]} that divide or order them in another way, so learning rates "
            "would go to the wrong parameters. Return the same groups from configure_optimizers as in the run that "
            "saved it."
        )
    groups = []
    for names, position in zip(here, positions):
        assert position is not None
        old = state["param_groups"][position]
        keys = dict(zip(saved[position], old["params"]))
        groups.append({**old, "params": [keys[name] for name in names]})
    return {**state, "param_groups": groups}


def keyed_by_name(state: Mapping[str, Any], saved: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return a saved state dict with the names of its parameters in place of their numbers."""
    names = {k: n for group, named in zip(state["param_groups"], saved) for k, n in zip(group["params"], named)}
    groups = [{**group, "params": list(named)} for group, named in zip(state["param_groups"], saved)]
    return {**state, "state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def _position(group: Sequence[str], saved: Sequence[Sequence[str]]) -> int | None:
    return next((i for i, names in enumerate(saved) if set(names) == set(group) and len(names) == len(group)), None)
