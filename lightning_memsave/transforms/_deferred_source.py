"""One call of an output head whose logits were not made: what it takes to make them, all or in chunks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._deferred_heads import adapter_state, describe_head, in_adapter_state, is_sharded
from lightning_memsave.transforms._deferred_projection import Head
from lightning_memsave.transforms._patch import InstanceForward
from lightning_memsave.transforms.chunked_loss import ChunkOptions, Rows, products_of

__all__ = ["Ancestors", "DeferCounts", "Source"]

T = TypeVar("T")


@dataclass
class DeferCounts:
    """What became of the logits of one head.

    Args:
        deferred: Calls of the head that made no logits.
        losses: Losses that ran in chunks.
        reductions: Other results that were made in chunks: ``argmax``, ``topk``, ``logsumexp``, ``gather``.
        materialised: Function -> how often it got all logits of a call.
        materialised_bytes: The largest logits that were made so.
        plain: Why a call made its logits at once -> how often.
        notes: What else to say, e.g. why a backend was not used.

    """

    deferred: int = 0
    losses: int = 0
    reductions: int = 0
    materialised: Counter[str] = field(default_factory=Counter)
    materialised_bytes: int = 0
    plain: Counter[str] = field(default_factory=Counter)
    notes: set[str] = field(default_factory=set)


class Ancestors:
    """The modules a head is in, outermost first; forgotten by a pickle, since only FSDP2 asks for them."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = [weakref.ref(module) for module in modules]

    def __iter__(self) -> Iterator[nn.Module]:
        """Iterate over those that are alive."""
        return (module for reference in self._modules if (module := reference()) is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Forget the modules."""
        return Ancestors, ([],)


class Source:
    """One call of a head: its input, and the way to its logits.

    Args:
        patch: The head's patched forward.
        hidden: ``(..., D)``, what the head was called with.

    """

    def __init__(self, patch: InstanceForward, hidden: Tensor) -> None:
        self.patch = patch
        self.hidden = hidden
        self.counts: DeferCounts = patch.options["counts"]
        self.options: ChunkOptions = patch.options["chunks"]
        self.products = products_of(hidden)
        self.grad = torch.is_grad_enabled()
        self.sharded = is_sharded(patch.module)
        self.adapters = adapter_state(patch.module)
        self.weights = [weakref.ref(p) for p in patch.module.parameters()]
        self.versions = self._versions()
        # Only the real logits count: they were changed in place, their gradient is watched, or they outlived the step.
        self.touched = False
        self.hooks: list[Callable[[Tensor], Any]] = []
        self.best_rows: Tensor | None = None  # the likeliest class of every row, -1 where unknown
        self.best_steps: object = None
        self.edge: Any = None  # where the graph of the real logits begins
        self.lazies: weakref.WeakSet[Any] = weakref.WeakSet()

    # -- the head ---------------------------------------------------------------------------------------------------
    def enter(self, work: Callable[[Tensor], T]) -> T:
        """Return ``work(hidden)``, run where the head's weights are whole.

        A head that FSDP2 shards by itself is entered through its own call, so that its hooks gather the weights and
        reduce the gradients.
        """
        self._check()
        module = self.patch.module
        with in_adapter_state(module, self.adapters):
            if self.sharded:
                result: T = module(self.hidden, _memsave=work)
                return result
            gathered = self._gather()
            self._need_weights()
            result = work(self.hidden)
            if gathered is not None and not torch.is_grad_enabled():
                gathered.reshard()
            return result

    def head(self) -> Head:
        """Return how the head makes its logits; inside ``enter``."""
        return describe_head(self.patch, self.products.dtype)

    def logits(self) -> Tensor:
        """Return all logits, with their graph, in the dtype the head gives."""
        out = self.again()
        if out.requires_grad:
            self.edge = get_gradient_edge(out)
            for hook in self.hooks:
                out.register_hook(hook)  # type: ignore[no-untyped-call]
        return out

    def again(self, hidden: Tensor | None = None) -> Tensor:
        """Return all logits, of other hidden states if some are given."""

        def work(own: Tensor) -> Tensor:
            with self.products.autocast():
                out: Tensor = self.patch.inner(own if hidden is None else hidden)
            return out

        return self.enter(work)

    def rows(self, hidden: Tensor, index: Tensor | None) -> Rows:
        """Return rows of the hidden states."""
        return Rows(hidden, self.products, index)

    def _gather(self) -> Any:
        """Gather weights that an outer FSDP2 module took away after its forward; return that module."""
        weight = getattr(self.patch.module, "weight", None)
        if not hasattr(weight, "device_mesh"):
            return None
        for module in reversed(list(self.patch.options["ancestors"])):
            if is_sharded(module):
                module.unshard()
                if not hasattr(self.patch.module.weight, "device_mesh"):
                    return module
        raise ConfigurationError(
            "ChunkedLoss: the head's weight was sharded after its forward, and no FSDP2 module around it gathers it. "
            "Leave ChunkedLoss out on this strategy."
        )

    def _need_weights(self) -> None:
        for parameter in self.patch.module.parameters():
            if parameter.numel() and not parameter.is_meta and not _is_there(parameter):
                raise ConfigurationError(
                    "ChunkedLoss: the strategy took the head's weight away after its forward, so the loss cannot run. "
                    "Leave ChunkedLoss out on this strategy, or keep the head whole."
                )

    # -- the state it was called in -----------------------------------------------------------------------------------
    def _versions(self) -> list[int | None]:
        weights = [] if self.sharded else [reference() for reference in self.weights]
        return [_version(self.hidden), *(_version(w) for w in weights)]

    def _check(self) -> None:
        if any(hasattr(p, "device_mesh") for p in self.patch.module.parameters()) or not self.weights:
            return
        now = self._versions()
        if now[0] != self.versions[0]:
            what = "the hidden states that the head was called with were changed in place since"
        elif now != self.versions:
            what = "the head's weights were changed since (an optimizer stepped)"
        else:
            return
        raise ConfigurationError(
            f"ChunkedLoss: logits are used, and {what}, so they cannot be made any more. Use them before, or keep "
            "logits.detach().clone()."
        )


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _is_there(tensor: Tensor) -> bool:
    """Return whether a tensor's storage was not freed under it; wrappers and fake tensors have none."""
    try:
        return tensor.untyped_storage().nbytes() > 0
    except (RuntimeError, NotImplementedError):
        return True
