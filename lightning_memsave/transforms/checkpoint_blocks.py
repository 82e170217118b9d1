"""Recompute a block's activations in backward instead of keeping them: non-reentrant, in place, no name changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointError

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms._recompute import SUBJECT, RecomputeCounts, recomputed_forward, running
from lightning_memsave.transforms._replay import ForwardHabits
from lightning_memsave.transforms.blocks import Block, select_blocks

__all__ = [
    "POLICIES",
    "RecomputeCounts",
    "checkpoint_blocks",
    "explain_recompute_errors",
    "inactive_regularization",
    "recompute_counts",
]

POLICIES = ("full", "selective", "every_n")
# What transformers and diffusers, and timm, call the switch of their own checkpointing.
_OWN_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")


def checkpoint_blocks(
    root: nn.Module, patterns: Sequence[str] = ("auto",), *, policy: str = "full", every_n: int = 2
) -> Applied:
    """Recompute the selected blocks of a model in backward, in place.

    Args:
        root: Any module.
        patterns: ``("auto",)`` for the repeated blocks, else globs over qualified names or class names. Of nested
            matches the outermost is taken.
        policy: ``"full"``, ``"selective"`` (the results of matrix products and attention are kept) or ``"every_n"``.
        every_n: With ``"every_n"``, the first and then every n-th block of each group is recomputed.

    Returns:
        What was done, with the way back.

    Raises:
        NothingToTransformError: If nothing is selected.
        ConfigurationError: If a selected block is recomputed already, or cannot be changed; nothing was changed then.

    """
    blocks = select_blocks(root, patterns, subject=SUBJECT)
    if policy == "every_n":
        blocks = _every_nth(blocks, every_n)
    switches = _own_switches(root, blocks, everywhere=tuple(patterns) == ("auto",))
    _refuse(root, blocks)
    undo: list[Callable[[], None]] = [_turn_off(module, switch) for _, module, switch in switches]
    for block in blocks:
        options = {"name": block.name, "policy": policy, "counts": RecomputeCounts(), "habits": ForwardHabits()}
        undo.append(patch_forward(block.module, recomputed_forward, **options))
    classes = Counter(type(block.module).__name__ for block in blocks)
    what = ", ".join(f"{count} {name}" for name, count in classes.items())
    how = " except matrix products and attention" if policy == "selective" else ""
    own = f"; the model's own {switches[0][2]} is off meanwhile" if switches else ""

    def undo_all() -> None:
        while undo:
            undo.pop()()

    return Applied(summary=f"recompute {what} in backward{how}{own}", num_modules=len(blocks), undo=undo_all)


def recompute_counts(root: nn.Module) -> dict[str, RecomputeCounts]:
    """Return the counts of every block below ``root`` that is recomputed, by qualified name."""
    found = ((name, _patch_of(module)) for name, module in root.named_modules())
    return {name: patch.options["counts"] for name, patch in found if patch is not None}


def inactive_regularization(root: nn.Module) -> str:
    """Return a sentence on recomputed blocks whose dropout or batch statistics are off, or ``""``."""
    blocks = [module for module in root.modules() if _patch_of(module) is not None]
    silent = [block for block in blocks if any(_regularizes(m) and not m.training for m in block.modules())]
    if not silent:
        return ""
    return (
        f"{len(silent)} of {len(blocks)} recomputed blocks are in eval mode, as from_pretrained returns them: they "
        "train, without dropout and batch statistics. Call .train() on the model if that is not wanted."
    )


def _regularizes(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return isinstance(module, _BatchNorm)


@contextmanager
def explain_recompute_errors() -> Iterator[None]:
    """Name the block if a recompute inside does not repeat its forward."""
    try:
        yield
    except RuntimeError as error:
        of_selective = "encountered during backward" in str(error) or "backward an extra time" in str(error)
        if not running or not (isinstance(error, CheckpointError) or of_selective):
            raise
        if "backward an extra time" in str(error):
            advice = 'policy="selective" allows one backward through a block; use policy="full" for more.'
        else:
            advice = (
                "Its forward does not repeat itself: it depends on data it changes, or on something outside the module "
                f"that changed since. Leave {running[-1]!r} out: name the other blocks with "
                "modules=[...]."
            )
        first_line = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"{SUBJECT}: recomputing {running[-1]!r} in backward failed. {advice}\n{first_line}"
        ) from error


# -- choosing ---------------------------------------------------------------------------------
def _every_nth(blocks: list[Block], every_n: int) -> list[Block]:
    seen: Counter[str] = Counter()
    chosen = []
    for block in blocks:
        if seen[block.group] % every_n == 0:
            chosen.append(block)
        seen[block.group] += 1
    return chosen


def _patch_of(module: nn.Module) -> InstanceForward | None:
    forward = module.__dict__.get("forward")
    while isinstance(forward, InstanceForward):
        if forward.call is recomputed_forward:
            return forward
        forward = forward.inner
    return None


def _refuse(root: nn.Module, blocks: list[Block]) -> None:
    taken = {id(module): name for name, module in root.named_modules() if _patch_of(module) is not None}
    inside = {id(inner): name for name, m in root.named_modules() if id(m) in taken for inner in m.modules()}
    for block in blocks:
        other = inside.get(id(block.module)) or next(
            (taken[id(m)] for m in block.module.modules() if id(m) in taken), ""
        )
        if other:
            raise ConfigurationError(
                f"{SUBJECT}: {block.name!r} is selected, and {other!r} is recomputed already, so its forward "
                "would run more than twice. Give every ActivationCheckpointing other modules, none inside another's."
            )
        if isinstance(block.module, torch.jit.ScriptModule):
            raise ConfigurationError(
                f"{SUBJECT}: {block.name!r} is a TorchScript module, whose forward cannot be replaced. Use the Python "
                "module, or name other blocks with modules=[...]."
            )


def _own_switches(root: nn.Module, blocks: list[Block], *, everywhere: bool) -> list[tuple[str, nn.Module, str]]:
    """Return where the model's own checkpointing is on and would recompute the blocks a second time."""
    on = [
        (name, module, switch)
        for name, module in root.named_modules()
        for switch in _OWN_SWITCHES
        if getattr(module, switch, False) is True
    ]
    if everywhere or not on:
        return on
    inside = {id(inner) for block in blocks for inner in block.module.modules()}
    names = [f"{block.name}." for block in blocks]
    clash = [
        (name, switch)
        for name, module, switch in on
        if id(module) in inside or any(block.startswith(f"{name}." if name else "") for block in names)
    ]
    if clash:
        name, switch = clash[0]
        raise ConfigurationError(
            f"{SUBJECT}: {name or type(root).__name__!r} already recomputes its layers itself ({switch}=True), and "
            f'{blocks[0].name!r} was selected too. Turn the model\'s own checkpointing off, or write modules="auto" to '
            "replace it for the run."
        )
    return []


def _turn_off(module: nn.Module, switch: str) -> Callable[[], None]:
    setattr(module, switch, False)
    return partial(setattr, module, switch, True)
