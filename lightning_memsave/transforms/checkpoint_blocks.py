"""Recompute a block's activations in backward instead of keeping them: non-reentrant, in place, no name changes."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointError, checkpoint, create_selective_checkpoint_contexts

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms._replay import ForwardState
from lightning_memsave.transforms._selective import keep_products
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
_SUBJECT = "ActivationCheckpointing"
# What transformers and diffusers, and timm, call the switch of their own checkpointing.
_OWN_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")


@dataclasses.dataclass
class RecomputeCounts:
    """How often a checkpointed block ran.

    Args:
        calls: Forwards whose activations were left to be recomputed.
        recomputed: Forwards that ran again in a backward.
        passed: Forwards that kept everything as usual, since no gradient was asked for.

    """

    calls: int = 0
    recomputed: int = 0
    passed: int = 0


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
    blocks = select_blocks(root, patterns, subject=_SUBJECT)
    if policy == "every_n":
        blocks = _every_nth(blocks, every_n)
    switches = _own_switches(root, blocks, everywhere=tuple(patterns) == ("auto",))
    _refuse(root, blocks)
    undo: list[Callable[[], None]] = [_turn_off(module, switch) for _, module, switch in switches]
    for block in blocks:
        options = {"name": block.name, "policy": policy, "counts": RecomputeCounts(), "learned": set()}
        undo.append(patch_forward(block.module, _forward, **options))
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
        if not _running or not (isinstance(error, CheckpointError) or of_selective):
            raise
        if "backward an extra time" in str(error):
            advice = 'policy="selective" allows one backward through a block; use policy="full" for more.'
        else:
            advice = (
                "Its forward does not repeat itself: it depends on data it changes, or on something outside the module "
                f"that changed since. Leave {_running[-1]!r} out: name the other blocks with "
                "modules=[...]."
            )
        first_line = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"{_SUBJECT}: recomputing {_running[-1]!r} in backward failed. {advice}\n{first_line}"
        ) from error


# -- one call ---------------------------------------------------------------------------------
# The block whose recompute began last. A plain list: backward runs in a thread of autograd's.
_running: list[str] = []


def _forward(patch: InstanceForward, *args: Any, **kwargs: Any) -> Any:
    """Run a block so that its backward recomputes it."""
    context_fn = partial(create_selective_checkpoint_contexts, keep_products)
    options: dict[str, Any] = {"context_fn": context_fn} if patch.options["policy"] == "selective" else {}
    if torch.compiler.is_compiling():
        return checkpoint(patch.inner, *args, use_reentrant=False, **options, **kwargs)
    counts: RecomputeCounts = patch.options["counts"]
    if not torch.is_grad_enabled() or torch.jit.is_tracing():
        counts.passed += 1
        return patch.inner(*args, **kwargs)
    args, kwargs = _without_cache(patch, args, kwargs)
    call = _Call(patch, args, kwargs)
    if not call.needs_gradient():
        counts.passed += 1
        return patch.inner(*args, **kwargs)
    call.begin()
    output = checkpoint(call, *call.saved, use_reentrant=False, **options)
    call.settle()
    counts.calls += 1
    return output


class _Call:
    """One forward of a block, and its recomputes.

    The arguments are passed to ``checkpoint`` flat: it saves tensors, and keeps the random state of devices, only of
    what it sees at the top level.
    """

    def __init__(self, patch: InstanceForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.patch = patch
        self.arguments: tuple[Any, Any] | None = (args, kwargs)
        leaves, self.spec = tree_flatten((args, kwargs))
        self.num_leaves = len(leaves)
        self.saved = [_snapshot(leaf) for leaf in leaves]
        self.versions = [_version(leaf) for leaf in leaves]
        self.state: ForwardState | None = None

    spec: TreeSpec

    def needs_gradient(self) -> bool:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self.saved):
            return True
        return any(parameter.requires_grad for parameter in self.patch.module.parameters())

    def begin(self) -> None:
        options = self.patch.options
        first = not options["counts"].calls
        self.state = ForwardState(self.patch.module, options["learned"], first=first)
        device = next((p.device for p in self.patch.module.parameters()), torch.device("cpu"))
        seen = {leaf.device.type for leaf in self.saved if isinstance(leaf, Tensor)}
        if device.type not in seen and device.type not in ("cpu", "meta"):
            # The arguments hide their tensors (a graph object): show checkpoint the device whose random state counts.
            self.saved.append(torch.empty(0, device=device))

    def __call__(self, *saved: Any) -> Any:
        if self.arguments is not None:
            # The forward gets the caller's own objects, so that what it writes into them arrives.
            (args, kwargs), self.arguments = self.arguments, None
            return self.patch.inner(*args, **kwargs)
        assert self.state is not None
        _running[:] = [self.patch.options["name"]]
        self.patch.options["counts"].recomputed += 1
        args, kwargs = tree_unflatten([_snapshot(leaf) for leaf in saved[: self.num_leaves]], self.spec)
        with self.state.replayed():
            return self.patch.inner(*args, **kwargs)

    def settle(self) -> None:
        """Drop what the recompute will not need, and refuse what it cannot repeat."""
        assert self.state is not None
        name = self.patch.options["name"]
        for leaf, version in zip(self.saved, self.versions):
            if _version(leaf) != version:
                raise ConfigurationError(
                    f"{_SUBJECT}: {name!r} ({type(self.patch.module).__name__}) changes its input of shape "
                    f"{tuple(leaf.shape)} in place, so it cannot be recomputed from it. Use inplace=False in its first "
                    "layer, or leave the block out: name the other blocks with modules=[...]."
                )
        self.state.settle(name)
        self.saved = []


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _snapshot(leaf: Any) -> Any:
    """Return what to recompute from: a batch object a block may write on is copied (not the tensors in it)."""
    if isinstance(leaf, (Tensor, nn.Module, type)) or not hasattr(leaf, "__dict__"):
        return leaf
    writable = dataclasses.is_dataclass(leaf) or hasattr(type(leaf), "__copy__")
    if writable or any(isinstance(value, Tensor) for value in vars(leaf).values()):
        return copy.copy(leaf)
    return leaf


def _without_cache(
    patch: InstanceForward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take an empty key/value cache out of the arguments: a recompute would append to it a second time."""
    if not any(_is_cache(value) for value in (*args, *kwargs.values())):
        return args, kwargs
    for cache in filter(_is_cache, (*args, *kwargs.values())):
        if _holds_state(cache, patch.module):
            raise ConfigurationError(
                f"{_SUBJECT}: {patch.options['name']!r} was given a key/value cache that already holds tokens, with "
                "gradients enabled; recomputing would append to it twice. Call the model with use_cache=False or under "
                "torch.no_grad(), or leave the block out: name the other blocks with modules=[...]."
            )
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {key: None if _is_cache(value) else value for key, value in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    return args, kwargs


def _is_cache(value: Any) -> bool:
    return not isinstance(value, (Tensor, nn.Module)) and any(cls.__name__ == "Cache" for cls in type(value).__mro__)


def _holds_state(cache: Any, block: nn.Module) -> bool:
    index = next((m.layer_idx for m in block.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
    try:
        return bool(cache.get_seq_length(index))
    except (AttributeError, TypeError, ValueError):  # layers that keep a state instead of tokens
        previous = getattr(cache, "has_previous_state", False)
        return bool(previous() if callable(previous) else previous)


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
        if forward.call is _forward:
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
                f"{_SUBJECT}: {block.name!r} is selected, and {other!r} is recomputed already, so its forward "
                "would run more than twice. Give every ActivationCheckpointing other modules, none inside another's."
            )
        if isinstance(block.module, torch.jit.ScriptModule):
            raise ConfigurationError(
                f"{_SUBJECT}: {block.name!r} is a TorchScript module, whose forward cannot be replaced. Use the Python "
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
            f"{_SUBJECT}: {name or type(root).__name__!r} already recomputes its layers itself ({switch}=True), and "
            f'{blocks[0].name!r} was selected too. Turn the model\'s own checkpointing off, or write modules="auto" to '
            "replace it for the run."
        )
    return []


def _turn_off(module: nn.Module, switch: str) -> Callable[[], None]:
    setattr(module, switch, False)
    return partial(setattr, module, switch, True)
