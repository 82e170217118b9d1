"""Run a task over the logits of a head, one chunk of rows at a time; gradients are made in the same pass.

Only one chunk of logits is alive. What is kept for backward is the gradient of the hidden states and of the head's
trainable parameters, or, where the gradient of every row is scaled by its own number, the hidden states themselves:
the chunks are then computed once more in backward.
"""

# N = rows of the call, M = rows of the hidden states, c = rows of a chunk, D = hidden size, V = vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._deferred_projection import Head, Products
from lightning_memsave.transforms._deferred_tasks import Steps, Task

__all__ = ["Call", "Reduction", "each_chunk", "refuse_second_derivative", "run_chunked"]

Reduction = Literal["none", "sum", "mean"]


@dataclass
class Call:
    """Everything about one pass but its tensors that need a gradient.

    Args:
        head: Makes the logits.
        task: What to make of them.
        steps: What happens to the logits first, elementwise.
        index: Which rows of the hidden states, flattened to ``(M, D)``; ``None`` means all.
        chunk: Rows in a chunk.
        products: How the head multiplies.
        reduction: ``none`` returns what the task gives for every row; the others its sum, or that over its normalizer.

    """

    head: Head
    task: Task
    steps: Steps
    index: Tensor | None
    chunk: int
    products: Products
    reduction: Reduction


def run_chunked(call: Call, hidden: Tensor) -> Tensor:
    """Run a task over all rows; differentiable once by hidden states and the head's trainable tensors.

    Args:
        call: The pass.
        hidden: ``(..., D)``.

    Returns:
        A 0-dim tensor, or ``(N, ...)`` as the task gives it, in the wide dtype.

    """
    out: Tensor = _Chunked.apply(call, hidden, *call.head.tensors)  # type: ignore[no-untyped-call]
    return out


def each_chunk(call: Call, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, logits)`` of every chunk, without gradient; the logits are valid until the next one."""
    with torch.no_grad(), call.products.without_autocast():
        passed = _Pass(call, hidden, call.head.tensors, [False] * (1 + len(call.head.tensors)))
        for rows in passed.chunks():
            yield rows, passed.logits(rows)


class _Pass:
    """The loop over the chunks of a call."""

    def __init__(self, call: Call, hidden: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> None:
        self.call = call
        self.base = hidden.detach().reshape(-1, hidden.shape[-1])
        self.num_rows = self.base.shape[0] if call.index is None else call.index.numel()
        self.chunk = max(1, min(call.chunk, self.num_rows))
        self.run = call.head.open(call.products, tensors, self.chunk, needs)
        self.chosen = self.base
        self.kept: list[Tensor | None] = []

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, self.chunk):
            yield slice(start, min(start + self.chunk, self.num_rows))

    def logits(self, rows: slice) -> Tensor:
        index = self.call.index
        part = self.base[rows] if index is None else self.base.index_select(0, index[rows])
        self.chosen = part.to(self.call.products.dtype)
        z = self.run.logits(self.chosen)
        self.kept = [step.forward(z) for step in self.call.steps]
        return z

    def gradients(self, dz: Tensor) -> Tensor | None:
        for step, kept in zip(reversed(self.call.steps), reversed(self.kept)):
            step.backward(dz, kept)
        self.kept = []
        return self.run.gradients(self.chosen, dz)

    def into(self, total: Tensor, rows: slice, gradient: Tensor | None) -> None:
        """Add the gradient of a chunk's rows to that of the hidden states."""
        assert gradient is not None
        if self.call.index is None:
            total[rows] = gradient
        else:  # a row may be asked for twice
            total.index_add_(0, self.call.index[rows], gradient.to(total.dtype))

    def new_total(self) -> Tensor:
        make = torch.empty if self.call.index is None else torch.zeros
        return make(self.base.shape, dtype=self.call.products.dtype, device=self.base.device)

    def parameter_gradients(self, tensors: Sequence[Tensor | None], scale: Tensor | None) -> list[Tensor | None]:
        """Return the sums in the dtypes of the parameters, and let go of everything else."""
        sums = self.run.close()
        found: list[Tensor | None] = []
        while sums:
            total, tensor = sums.pop(0), tensors[len(found)]
            if total is not None and tensor is not None:
                total = (total if scale is None else total.mul_(scale)).to(tensor.dtype)
            found.append(total)
        return found


def _backward_rows(
    call: Call, hidden: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool], upstream: Tensor
) -> list[Tensor | None]:
    """Compute the chunks again and return the gradients of hidden states and tensors.

    Args:
        call: The pass.
        hidden: ``(..., D)``.
        tensors: Those of the head.
        needs: For hidden states and each tensor: whether its gradient is asked for.
        upstream: Gradient of what the task gives for every row.

    """
    with torch.no_grad(), call.products.without_autocast():
        passed = _Pass(call, hidden, tensors, needs)
        total = passed.new_total() if needs[0] else None
        for rows in passed.chunks():
            _upstream_gradients(passed, rows, upstream, total)
        of_tensors = passed.parameter_gradients(tensors, None)
    return [None if total is None else total.view(hidden.shape).to(hidden.dtype), *of_tensors]


def _value_and_gradients(passed: _Pass, rows: slice, out: Tensor, of_hidden: Tensor | None, reduced: bool) -> None:
    z = passed.logits(rows)
    out[rows] = passed.call.task.value_and_grad(z, rows, None)
    gradient = passed.gradients(z)
    if of_hidden is not None and reduced:
        passed.into(of_hidden, rows, gradient)
    elif of_hidden is not None:
        assert gradient is not None
        of_hidden[rows] = gradient


def _upstream_gradients(passed: _Pass, rows: slice, upstream: Tensor, total: Tensor | None) -> None:
    z = passed.logits(rows)
    passed.call.task.value_and_grad(z, rows, upstream[rows])
    gradient = passed.gradients(z)
    if total is not None:
        passed.into(total, rows, gradient)


class _Chunked(torch.autograd.Function):
    """A task over all chunks."""

    @staticmethod
    def forward(ctx: Any, call: Call, hidden: Tensor, *tensors: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        reduced = call.reduction != "none"
        now = any(needs) and (reduced or (call.task.row_scaled and not any(needs[1:])))
        with call.products.without_autocast():
            passed = _Pass(call, hidden, tensors, needs if now else [False] * len(needs))
            like = torch.empty(0, dtype=call.products.wide, device=hidden.device)
            out = call.task.output(passed.num_rows, like)
            of_hidden = _gradient_of_hidden(passed, reduced) if now and needs[0] else None
            for rows in passed.chunks():
                if now:
                    _value_and_gradients(passed, rows, out, of_hidden, reduced)
                else:
                    out[rows] = call.task.value(passed.logits(rows), rows)
            normalizer = call.task.normalizer(like) if call.reduction == "mean" else None  # type: ignore[attr-defined]
            scale = None if normalizer is None else normalizer.reciprocal().nan_to_num(posinf=0.0)
            of_tensors = passed.parameter_gradients(tensors, scale) if now else []
        ctx.call, ctx.now, ctx.needs = call, now, needs
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        if now:
            # The parameters' gradients are not given to saved-tensor hooks, which would take them for activations.
            ctx.of_tensors = of_tensors
            ctx.save_for_backward(of_hidden, scale)
        elif any(needs):
            ctx.save_for_backward(hidden, *tensors)
        if not reduced:
            return out
        total = out.sum()
        return total if normalizer is None else total / normalizer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative()
        (upstream,) = grads
        call: Call = ctx.call
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second read is an error
        if not ctx.now:
            hidden, *tensors = saved
            return None, *_backward_rows(call, hidden, tensors, ctx.needs, upstream)
        return None, *_scaled(ctx, saved, upstream)


def _gradient_of_hidden(passed: _Pass, reduced: bool) -> Tensor:
    if reduced:
        return passed.new_total()
    base = passed.base
    return torch.empty(passed.num_rows, base.shape[1], dtype=passed.call.products.dtype, device=base.device)


def _scaled(ctx: Any, saved: tuple[Tensor | None, ...], upstream: Tensor) -> list[Tensor | None]:
    """Return the gradients that forward made, times what comes from above; in place where this is the last use."""
    of_hidden, scale = saved
    if ctx.of_tensors is None:
        raise RuntimeError(
            "Trying to backward through a chunked loss a second time, after its gradients were given away. Pass "
            "retain_graph=True to the first backward."
        )
    last = not _graph_is_kept()
    of_tensors = ctx.of_tensors
    if last:
        ctx.of_tensors = None
    reduced = ctx.call.reduction != "none"
    if of_hidden is not None:
        factor = upstream if scale is None else upstream * scale
        of_hidden = _times(of_hidden, factor if reduced else factor[:, None], last)
        index = ctx.call.index
        if not reduced and index is not None:
            rows = ctx.shape[:-1].numel()
            total = torch.zeros(rows, ctx.shape[-1], dtype=of_hidden.dtype, device=of_hidden.device)
            of_hidden = total.index_add_(0, index, of_hidden)
        of_hidden = of_hidden.view(ctx.shape).to(ctx.dtype)
    for position, gradient in enumerate(of_tensors):
        if gradient is not None:
            # Taken out of the list, so that autograd is its only owner and need not copy it.
            of_tensors = list(of_tensors) if not last else of_tensors
            of_tensors[position] = _times(gradient, upstream, last)
    return [of_hidden, *of_tensors]


def _times(tensor: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    return tensor.mul_(factor) if in_place else (tensor * factor).to(tensor.dtype)


def refuse_second_derivative() -> None:
    """Raise inside a backward whose result is to be differentiated again: it would be taken for a constant.

    Raises:
        ConfigurationError: Under ``create_graph=True``.

    """
    if torch.is_grad_enabled():
        raise ConfigurationError(
            "ChunkedLoss: create_graph=True asks for a gradient of the gradient, and the gradient of a chunked loss is "
            "made without a graph. Leave ChunkedLoss out where a gradient penalty goes through the loss."
        )


def _graph_is_kept() -> bool:
    """Return whether the running backward was asked to keep the graph, as far as this torch tells."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else bool(keeps())
