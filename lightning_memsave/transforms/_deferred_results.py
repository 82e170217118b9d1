"""Results of deferred logits in which the vocabulary is gone: they run in chunks of rows."""

# A rule takes the function's own arguments and returns its result, or NotImplemented where only real values do.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.transforms._deferred_engine import Call, each_chunk, run_chunked
from lightning_memsave.transforms._deferred_source import Source
from lightning_memsave.transforms._deferred_tasks import LogSumExp, Picked
from lightning_memsave.transforms._deferred_views import dimension
from lightning_memsave.transforms.chunked_loss import Rows, cross_entropy_rows, rows_in_chunk
from lightning_memsave.transforms.deferred_logits import DeferredLogits, Lazy

__all__ = ["argmax", "cross_entropy", "gather", "logsumexp", "maximum", "nll_loss", "topk"]

_MOST_OF_TOPK = 128


def _run(x: DeferredLogits, work: Callable[[Source, Rows], Any], *, loss: bool = False) -> Any:
    """Return ``work(source, rows)`` with the head's weights at hand and gradients as they flow through ``x``."""
    lazy = x._memsave
    source = lazy.source
    index = None if lazy.index is None else lazy.index.reshape(-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and lazy.grad):
        result = source.enter(lambda hidden: work(source, source.rows(hidden, index)))
    if loss:
        source.counts.losses += 1
    else:
        source.counts.reductions += 1
    for tensor in result if isinstance(result, tuple) else (result,):
        for hook in source.hooks if tensor.requires_grad else ():
            tensor.register_hook(hook)
    return result


def _call(source: Source, rows: Rows, task: Any, steps: Any) -> Call:
    head = source.head()
    chunk = rows_in_chunk(len(rows), head.classes, rows.hidden.device, source.options.chunk_tokens)
    return Call(head, task, steps, rows.index, chunk, rows.products, "none")


def cross_entropy(
    x: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(x, DeferredLogits) or isinstance(target, DeferredLogits) or not isinstance(target, Tensor):
        return NotImplemented
    lazy = x._memsave
    axis_of_classes = 0 if len(lazy.shape) == 1 else 1
    if lazy.axis != axis_of_classes or target.shape != lazy.lead or target.dtype != torch.int64:
        return NotImplemented
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if weight is not None and (weight.requires_grad or weight.shape != (lazy.shape[lazy.axis],)):
        return NotImplemented
    if not 0.0 <= label_smoothing <= 1.0 or target.device != lazy.source.hidden.device:
        return NotImplemented

    def work(source: Source, rows: Rows) -> Any:
        loss, best, positions, why = cross_entropy_rows(
            rows, source.head(), target.reshape(-1), source.options, steps=lazy.steps, class_weight=weight,
            ignore_index=ignore_index, reduction=reduction, smoothing=label_smoothing,  # type: ignore[arg-type]
        )  # fmt: skip
        if why:
            source.counts.notes.add(f'backend="{source.options.backend}" was not used: {why}')
        if best is not None:
            _remember_best(source, lazy, rows.index, positions, best)
        return loss

    loss = _run(x, work, loss=True)
    return loss.view(lazy.lead) if reduction == "none" else loss


def nll_loss(
    x: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    if not isinstance(x, DeferredLogits) or not x._memsave.normalized:
        return NotImplemented
    return cross_entropy(x, target, weight, size_average, ignore_index, reduce, reduction)


def _remember_best(source: Source, lazy: Lazy, index: Tensor | None, kept: Tensor | None, best: Tensor) -> None:
    """Keep the likeliest classes, which the loss found on its way: accuracy is then free."""
    count = source.hidden.shape[:-1].numel()
    if source.best_rows is None or source.best_steps is not lazy.steps:
        source.best_rows = torch.full((count,), -1, dtype=torch.int64, device=best.device)
        source.best_steps = lazy.steps
    where = index if kept is None else kept if index is None else index[kept]
    if where is None:
        source.best_rows.copy_(best)
    else:
        source.best_rows[where] = best


def _best(x: DeferredLogits) -> Tensor:
    """Return the likeliest class of every row, ``(N,)``."""
    lazy = x._memsave
    source = lazy.source
    index = lazy.positions().reshape(-1)
    if source.best_rows is not None and source.best_steps is lazy.steps:
        found = source.best_rows[index]
        missing = (found < 0).nonzero()[:, 0]
        if not missing.numel():
            source.counts.reductions += 1
            return found
    else:
        found = torch.empty_like(index)
        missing = torch.arange(len(index), device=index.device)

    def work(source: Source, rows: Rows) -> None:
        call = _call(source, rows.take(missing), None, lazy.steps)
        for part, z in each_chunk(call, rows.hidden):
            found[missing[part]] = z.argmax(dim=1)

    with torch.no_grad():
        source.enter(lambda hidden: work(source, source.rows(hidden, index)))
    source.counts.reductions += 1
    _remember_best(source, lazy, index, None, found)
    return found


def _is_class_axis(lazy: Lazy, dim: Any) -> bool:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dimension(dim, len(lazy.shape)) == lazy.axis


def argmax(x: DeferredLogits, dim: Any = None, keepdim: bool = False) -> Any:
    lazy = x._memsave
    if not _is_class_axis(lazy, dim):
        return NotImplemented
    best = _best(x).view(lazy.lead)
    return best.unsqueeze(lazy.axis) if keepdim else best


def maximum(x: Any, dim: Any = None, keepdim: bool = False, **keywords: Any) -> Any:
    if keywords or not isinstance(x, DeferredLogits) or not _is_class_axis(x._memsave, dim):
        return NotImplemented
    lazy = x._memsave
    chosen = _best(x)
    values = _picked(x, chosen[:, None])[:, 0].view(lazy.lead).to(lazy.dtype)
    best = chosen.view(lazy.lead)
    if keepdim:
        values, best = values.unsqueeze(lazy.axis), best.unsqueeze(lazy.axis)
    return torch.return_types.max((values, best))


def topk(x: DeferredLogits, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True, **keywords: Any) -> Any:
    lazy = x._memsave
    usable = isinstance(k, int) and 0 < k <= min(_MOST_OF_TOPK, lazy.shape[lazy.axis])
    if keywords or not usable or not _is_class_axis(lazy, dim):
        return NotImplemented
    count = lazy.lead.numel()
    classes = torch.empty(count, k, dtype=torch.int64, device=lazy.source.hidden.device)

    def work(source: Source, rows: Rows) -> Tensor:
        for part, z in each_chunk(_call(source, rows, None, lazy.steps), rows.hidden):
            classes[part] = z.topk(k, dim=1, largest=largest, sorted=sorted).indices
        return classes

    with torch.no_grad():
        _run(x, work)
    shape = (*lazy.lead, k)
    values = _picked(x, classes).view(shape).to(lazy.dtype).movedim(-1, lazy.axis)
    return torch.return_types.topk((values, classes.view(shape).movedim(-1, lazy.axis)))


def logsumexp(x: DeferredLogits, dim: Any = None, keepdim: bool = False, **keywords: Any) -> Any:
    lazy = x._memsave
    if keywords or lazy.normalized or not _is_class_axis(lazy, dim):
        return NotImplemented
    out = _run(x, lambda source, rows: _task(source, rows, LogSumExp(), lazy)).view(lazy.lead)
    return out.unsqueeze(lazy.axis) if keepdim else out


def _task(source: Source, rows: Rows, task: Any, lazy: Lazy) -> Tensor:
    return run_chunked(_call(source, rows, task, lazy.steps), rows.hidden)


def _picked(x: DeferredLogits, classes: Tensor) -> Tensor:
    """Return the values of some classes of every row, ``(N, K)`` in the wide dtype."""
    lazy = x._memsave

    def work(source: Source, rows: Rows) -> Tensor:
        values = _task(source, rows, Picked(classes), lazy)
        return values - _task(source, rows, LogSumExp(), lazy)[:, None] if lazy.normalized else values

    result: Tensor = _run(x, work)
    return result


def gather(x: Any, dim: int, index: Any, **keywords: Any) -> Any:
    if keywords or not isinstance(x, DeferredLogits) or isinstance(index, DeferredLogits):
        return NotImplemented
    lazy = x._memsave
    last = len(lazy.shape) - 1
    if lazy.axis != last or dimension(dim, len(lazy.shape)) != last or index.ndim != len(lazy.shape):
        return NotImplemented
    if index.shape[:-1] != lazy.lead or index.dtype != torch.int64:
        return NotImplemented
    return _picked(x, index.reshape(-1, index.shape[-1])).view(index.shape)
