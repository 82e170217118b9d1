"""One forward of a block that is recomputed in its backward, by ``torch.utils.checkpoint`` without reentry."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._patch import InstanceForward
from lightning_memsave.transforms._replay import ForwardState
from lightning_memsave.transforms._selective import keep_products

__all__ = ["SUBJECT", "RecomputeCounts", "recomputed_forward", "running"]

SUBJECT = "ActivationCheckpointing"


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


# The block whose recompute began last. A plain list: backward runs in a thread of autograd's.
running: list[str] = []


def recomputed_forward(patch: InstanceForward, *args: Any, **kwargs: Any) -> Any:
    """Run a block so that its backward recomputes it."""
    selective = patch.options["policy"] == "selective"
    if torch.compiler.is_compiling():
        # Traced into the graph: the compiler recomputes, and writes on buffers as a part of the graph.
        if selective:
            return checkpoint(patch.inner, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)
        return checkpoint(patch.inner, *args, use_reentrant=False, **kwargs)
    counts: RecomputeCounts = patch.options["counts"]
    if not torch.is_grad_enabled() or torch._C._is_tracing():
        counts.passed += 1
        return patch.inner(*args, **kwargs)
    args, kwargs = _without_cache(patch, args, kwargs)
    call = _Call(patch, args, kwargs)
    if not call.needs_gradient():
        counts.passed += 1
        return patch.inner(*args, **kwargs)
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"{SUBJECT}: {patch.options['name']!r} was called inside a torch.func transform or another region without "
            "saved-tensor hooks, where nothing can be recomputed. Leave the block out: name the other blocks with "
            "modules=[...]."
        )
    call.begin()
    contexts = call.selective_contexts if selective else noop_context_fn
    output = checkpoint(call, *call.saved, use_reentrant=False, context_fn=contexts)
    call.settle()
    counts.calls += 1
    return output


def _selective_contexts() -> tuple[Any, Any]:
    forward, recompute = create_selective_checkpoint_contexts(keep_products)  # type: ignore[no-untyped-call]
    return forward, recompute


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
        self.selective = False

    def needs_gradient(self) -> bool:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self.saved):
            return True
        return any(parameter.requires_grad for parameter in self.patch.module.parameters())

    def begin(self) -> None:
        self.state = ForwardState(self.patch.module, self.patch.options["habits"])
        device = next((p.device for p in self.patch.module.parameters()), torch.device("cpu"))
        seen = {leaf.device.type for leaf in self.saved if isinstance(leaf, Tensor)}
        if device.type not in seen and device.type not in ("cpu", "meta"):
            # The arguments hide their tensors (a graph object): show checkpoint the device whose random state counts.
            self.saved.append(torch.empty(0, device=device))

    def __call__(self, *saved: Any) -> Any:
        if self.arguments is not None:
            # The forward gets the caller's own objects, so that what it writes into them arrives.
            (args, kwargs), self.arguments = self.arguments, None
            with _no_cached_casts() if self.selective else nullcontext():
                return self.patch.inner(*args, **kwargs)
        assert self.state is not None
        running[:] = [self.patch.options["name"]]
        self.patch.options["counts"].recomputed += 1
        args, kwargs = tree_unflatten([_snapshot(leaf) for leaf in saved[: self.num_leaves]], self.spec)
        with nullcontext() if self.selective else self.state.replayed():
            return self.patch.inner(*args, **kwargs)

    def selective_contexts(self) -> tuple[Any, Any]:
        """Return the contexts of forward and recompute; the state is put back outside the one that counts operators."""
        forward, recompute = _selective_contexts()
        self.selective = True
        return forward, _Around(self, recompute)

    def settle(self) -> None:
        """Drop what the recompute will not need, and refuse what it cannot repeat."""
        assert self.state is not None
        name = self.patch.options["name"]
        for leaf, version in zip(self.saved, self.versions):
            if _version(leaf) != version:
                raise ConfigurationError(
                    f"{SUBJECT}: {name!r} ({type(self.patch.module).__name__}) changes its input of shape "
                    f"{tuple(leaf.shape)} in place, so it cannot be recomputed from it. Use inplace=False in its first "
                    "layer, or leave the block out: name the other blocks with modules=[...]."
                )
        self.state.settle(name)
        self.saved = []


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Cast weights anew: a recompute finds no cast of an earlier call, and selective counts every operator."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Around:
    """Put a call's state back, then enter the context of its recompute; may be entered again."""

    def __init__(self, call: _Call, recompute: Any) -> None:
        self.call, self.recompute, self.stack = call, recompute, ExitStack()

    def __enter__(self) -> None:
        assert self.call.state is not None
        self.stack.enter_context(self.call.state.replayed())
        self.stack.enter_context(self.recompute)

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


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
                f"{SUBJECT}: {patch.options['name']!r} was given a key/value cache that already holds tokens, with "
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
