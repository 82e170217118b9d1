"""Logits that are not made until somebody needs them: the tensor an output head returns while it trains.

``F.cross_entropy`` and whatever reduces the vocabulary away (``argmax``, ``topk``, ``logsumexp``, ``gather``) run over
chunks of rows; views over the other dimensions, casts and elementwise scaling are kept for later. Everything else gets
the real logits, with their graph, as if nothing had been deferred.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_memsave.transforms._deferred_engine import refuse_second_derivative
from lightning_memsave.transforms._deferred_heads import find_heads, from_fsdp, num_classes, why_not_deferred
from lightning_memsave.transforms._deferred_source import Ancestors, DeferCounts, Source
from lightning_memsave.transforms._deferred_tasks import Steps
from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms.chunked_loss import ChunkOptions

__all__ = ["DeferredLogits", "Lazy", "defer_counts", "defer_logits", "settle", "step_context"]

SUBJECT = "ChunkedLoss"


class Lazy:
    """What a deferred tensor stands for.

    Args:
        source: The call of the head.
        shape: Its shape.
        axis: Which dimension is the vocabulary.
        dtype: Its dtype.
        index: Positions in the flattened hidden states, of the shape without the vocabulary; ``None`` means all, in
            order.
        steps: What happened to the values, elementwise.
        normalized: Whether ``log_softmax`` was the last of it.
        grad: Whether gradients flow through.
        parent: The tensor it was made from.
        replay: Makes its values from those of its parent: the operation that was kept for later.

    """

    def __init__(
        self,
        source: Source,
        shape: tuple[int, ...],
        axis: int,
        dtype: torch.dtype,
        *,
        index: Tensor | None = None,
        steps: Steps = (),
        normalized: bool = False,
        grad: bool = True,
        parent: DeferredLogits | None = None,
        replay: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.source, self.shape, self.axis, self.dtype = source, torch.Size(shape), axis, dtype
        self.index, self.steps, self.normalized, self.grad = index, steps, normalized, grad
        self.parent, self.replay = parent, replay
        self.real: Tensor | None = None
        source.lazies.add(self)
        _living.add(self)

    @property
    def lead(self) -> torch.Size:
        """The shape without the vocabulary."""
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    def positions(self) -> Tensor:
        """Return ``index``, made if there is none yet."""
        if self.index is not None:
            return self.index
        count = self.source.hidden.shape[:-1].numel()
        return torch.arange(count, dtype=torch.int64, device=self.source.hidden.device).view(self.lead)

    def values(self, reason: str) -> Tensor:
        """Return the real tensor, made once: the head's forward, then the operations that were kept for later."""
        if self.real is None:
            # With the graph also where none is asked for at the moment: an autograd function reads values without one.
            with torch.set_grad_enabled(self.grad):
                if self.parent is None:
                    self.real = self.source.logits()
                    counts = self.source.counts
                    counts.materialised[reason] += 1
                    counts.materialised_bytes = max(counts.materialised_bytes, self.real.nbytes)
                else:
                    assert self.replay is not None
                    self.real = self.replay(self.parent._memsave.values(reason))
            self.parent = self.replay = None
        return self.real


_living: weakref.WeakSet[Lazy] = weakref.WeakSet()


class DeferredLogits(Tensor):
    """A tensor with shape, dtype and device, and a ``Lazy`` in the place of values."""

    _memsave: Lazy

    @staticmethod
    def __new__(cls: type, lazy: Lazy) -> DeferredLogits:
        """Make a tensor without storage for a lazy value."""
        made: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, lazy.shape, dtype=lazy.dtype, device=lazy.source.hidden.device, requires_grad=False
        )
        made._memsave = lazy
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describe the tensor without making its values."""
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep the operation for later, run it in chunks, or run it on the real values."""
        from lightning_memsave.transforms._deferred_rules import PLAIN, RULES

        kwargs = kwargs or {}
        if function in PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        deferred = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeferredLogits)]
        if function is Tensor.register_hook and len(args) == 2 and from_fsdp(args[1]):
            # FSDP2 gathers the weights of a module when its output gets a gradient: so does what is made of it.
            deferred[0]._memsave.source.hooks.append(args[1])
            return args[1]
        rule = RULES.get(function)
        if rule is not None and not any(d._memsave.source.touched for d in deferred):
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if _writes_or_watches(function, args, kwargs):
            for lazy in [lazy for d in deferred for lazy in list(d._memsave.source.lazies)]:
                lazy.values(_name(function))
                lazy.source.touched = True
        args, kwargs = tree_map_only(DeferredLogits, lambda d: d._memsave.values(_name(function)), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Give the values to C++ code (an autograd function, a distributed wrapper); its graph is ``_Link``'s."""

        def real(deferred: DeferredLogits) -> Tensor:
            return deferred._memsave.values(str(function)).detach()

        args, kwargs = tree_map_only(DeferredLogits, real, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Link(torch.autograd.Function):
    """Ties a deferred tensor into the graph, for code that autograd's Python functions do not see.

    The chunked operations do not come by here: they start from the hidden states.
    """

    @staticmethod
    def forward(ctx: Any, lazy: Lazy, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.lazy, ctx.inputs = lazy, (hidden, *parameters)
        return DeferredLogits(lazy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative()
        source: Source = ctx.lazy.source
        hidden, *parameters = ctx.inputs
        real = ctx.lazy.values("backward")
        # Down to the logits by the graph of the values, and from there anew: a tied weight is behind the hidden states
        # too, and that part is not ours to count.
        (upstream,) = torch.autograd.grad([real], [source.edge], grads, retain_graph=True)
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        with torch.enable_grad():
            logits = source.again(leaf)
        wanted = [tensor for tensor in (leaf, *parameters) if tensor.requires_grad]
        found = iter(torch.autograd.grad(logits, wanted, upstream, allow_unused=True))
        return None, *(next(found) if tensor.requires_grad else None for tensor in (leaf, *parameters))


def wrap(lazy: Lazy) -> DeferredLogits:
    """Return the tensor that stands for a lazy value, with a graph if one is asked for."""
    if not (lazy.grad and torch.is_grad_enabled()):
        lazy.grad = False
        return DeferredLogits(lazy)
    parameters = [p for p in lazy.source.patch.module.parameters() if p.requires_grad]
    made: DeferredLogits = _Link.apply(lazy, lazy.source.hidden, *parameters)  # type: ignore[no-untyped-call]
    return made


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):  # a property of Tensor
        return str(getattr(getattr(function, "__self__", None), "__name__", name))
    return str(name)


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE_OPERATORS = {f"__i{name}__" for name in _OPERATORS}
_WATCHES = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook", "__set__", "__setitem__", "set_"}


def _writes_or_watches(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a function may change the logits in place, or looks at their gradient."""
    name = getattr(function, "__name__", "")
    if name in _IN_PLACE_OPERATORS or name in _WATCHES:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return kwargs.get("out") is not None or bool(kwargs.get("inplace")) or any(value is True for value in args)


# -- the head ---------------------------------------------------------------------------------------------------------
def defer_logits(root: nn.Module, options: ChunkOptions | None = None) -> Applied:
    """Let the output heads of a model defer their logits, in place.

    A head defers while gradients are enabled, and inside ``deferring(root)`` without them too.

    Args:
        root: Any module.
        options: How losses are cut.

    Returns:
        What was done, with the way back.

    Raises:
        NothingToTransformError: If no head is found.

    """
    heads = find_heads(root, subject=SUBJECT)
    undo: list[Callable[[], None]] = []
    shown = []
    for name, module in heads:
        options_of = {
            "name": name,
            "chunks": options or ChunkOptions(),
            "counts": DeferCounts(),
            "ancestors": Ancestors(_around(root, name)),
            "always": False,
            "never": False,
        }
        undo.append(patch_forward(module, _deferred_forward, **options_of))
        shown.append(f"{name} ({getattr(module, 'out_features', '?')} classes)")

    def undo_all() -> None:
        while undo:
            undo.pop()()

    made = f"defer the logits of {', '.join(shown)}; losses run in chunks of rows"
    return Applied(summary=made, num_modules=len(heads), undo=undo_all)


def _around(root: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _deferred_forward(patch: InstanceForward, *args: Any, **kwargs: Any) -> Any:
    """Run a head: return logits that are not made yet, or do the work it was entered for."""
    if torch.compiler.is_compiling():
        return patch.inner(*args, **kwargs)
    work = kwargs.pop("_memsave", None)
    if work is not None:
        return work(*args)
    counts: DeferCounts = patch.options["counts"]
    why = _why_plain(patch, args, kwargs)
    if why is not None:
        if why:
            counts.plain[why] += 1
        return patch.inner(*args, **kwargs)
    counts.deferred += 1
    (hidden,) = args
    source = Source(patch, hidden)
    classes = num_classes(patch.module)
    assert classes is not None
    shape = (*hidden.shape[:-1], classes)
    return wrap(Lazy(source, shape, len(shape) - 1, source.products.dtype))


def _why_plain(patch: InstanceForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return ``None`` to defer; else why not, or ``""`` where nothing is lost by it."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return "the head was called with something else than one floating tensor"
    if isinstance(args[0], DeferredLogits) or args[0].ndim == 0 or args[0].is_sparse:
        return "the head was called with something else than one floating tensor"
    if patch.options["never"] or not (torch.is_grad_enabled() or patch.options["always"]):
        return ""
    if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "the head was called inside a torch.func transform or a trace"
    if torch.autograd.forward_ad._current_level >= 0:
        return "the head was called under forward-mode differentiation"
    return why_not_deferred(patch.module) or None


def patches_of(root: nn.Module) -> list[InstanceForward]:
    """Return the patched forwards of the heads below a module."""
    found = []
    for module in root.modules():
        forward = module.__dict__.get("forward")
        while isinstance(forward, InstanceForward):
            if forward.call is _deferred_forward and forward.active:
                found.append(forward)
            forward = forward.inner
    return found


def defer_counts(root: nn.Module) -> dict[str, DeferCounts]:
    """Return the counts of every head below ``root`` that defers its logits, by qualified name."""
    return {patch.options["name"]: patch.options["counts"] for patch in patches_of(root)}


@contextmanager
def deferring(root: nn.Module) -> Iterator[None]:
    """Defer without gradients too inside, and make what is still held at the end real: weights change after a step."""
    patches = patches_of(root)
    for patch in patches:
        patch.options["always"] = True
    try:
        yield
        settle()
    finally:
        for patch in patches:
            patch.options["always"] = False


@contextmanager
def plain_logits(root: nn.Module) -> Iterator[None]:
    """Defer nothing inside."""
    patches = patches_of(root)
    for patch in patches:
        patch.options["never"] = True
    try:
        yield
    finally:
        for patch in patches:
            patch.options["never"] = False


def step_context(root: nn.Module, phase: str) -> AbstractContextManager[None]:
    """Return what surrounds a step of a Trainer: ``training_step``, ``validation_step``, ``predict_step`` ..."""
    if phase == "backward":
        return nullcontext()
    return plain_logits(root) if phase == "predict_step" else deferring(root)


def settle() -> None:
    """Make the values of every deferred tensor that somebody still holds."""
    for lazy in list(_living):
        lazy.values("held after the step")
        lazy.source.touched = True
