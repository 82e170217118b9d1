"""Cross entropy of a linear head without its logits: the functional form, and how a loss is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._deferred_backends import (
    BACKENDS,
    Backend,
    choose_backend,
    liger_loss,
    missing_backend,
    torch_loss,
)
from lightning_memsave.transforms._deferred_engine import Call, Reduction, run_chunked
from lightning_memsave.transforms._deferred_projection import Head, LinearHead, Products
from lightning_memsave.transforms._deferred_tasks import CrossEntropy, Scale, Step, Steps, Tanh
from lightning_memsave.transforms._frozen import autocast_dtype

__all__ = [
    "ChunkOptions",
    "Rows",
    "chunk_problems",
    "chunked_cross_entropy",
    "cross_entropy_rows",
    "products_of",
    "rows_in_chunk",
]

# Bytes of one fp32 chunk of logits with chunk_tokens="auto": large enough that products run at full speed and the sum
# of a weight gradient is read seldom, small beside what it stands in for.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_ROUND_TO = 64


@dataclass(frozen=True)
class ChunkOptions:
    """How losses are cut.

    Args:
        chunk_tokens: Rows in a chunk, or ``"auto"``.
        backend: ``auto``, ``torch``, ``native`` or ``liger``.

    """

    chunk_tokens: int | Literal["auto"] = "auto"
    backend: Backend = "auto"


@dataclass(frozen=True)
class Rows:
    """Hidden states, which of their rows are meant, and how the head multiplies them.

    Args:
        hidden: ``(..., D)``.
        products: Dtype and autocast of where the head was called.
        index: Rows of ``hidden.reshape(-1, D)``; ``None`` means all.

    """

    hidden: Tensor
    products: Products
    index: Tensor | None = None

    def __len__(self) -> int:
        """Return N."""
        return self.hidden.shape[:-1].numel() if self.index is None else self.index.numel()

    def take(self, positions: Tensor) -> Rows:
        """Return some of these rows."""
        return replace(self, index=positions if self.index is None else self.index[positions])


def chunk_problems(chunk_tokens: object, backend: object) -> list[str]:
    """Return what is wrong with the two settings."""
    problems = []
    if chunk_tokens != "auto" and (type(chunk_tokens) is not int or chunk_tokens < 1):
        problems.append(f'chunk_tokens={chunk_tokens!r} must be an int of 1 or more, or "auto".')
    if backend not in BACKENDS:
        allowed = ", ".join(f'"{name}"' for name in BACKENDS)
        problems.append(f"backend={backend!r} is not a backend. Use one of {allowed}.")
    elif missing := missing_backend(str(backend)):
        problems.append(missing)
    return problems


def rows_in_chunk(num_rows: int, classes: int, device: torch.device, chunk_tokens: int | str = "auto") -> int:
    """Return how many rows go into one chunk; with ``auto``, chunks of one call are equally large.

    Example:
        >>> rows_in_chunk(1024, 49152, torch.device("cpu"))
        256

    """
    if chunk_tokens != "auto":
        return int(chunk_tokens)
    most = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * classes)
    most = max(_ROUND_TO, most // _ROUND_TO * _ROUND_TO)
    count = -(-num_rows // most) or 1
    return -(-num_rows // count) or 1


def products_of(hidden: Tensor) -> Products:
    """Return how a linear layer multiplies here: in autocast's dtype, or in that of its input."""
    autocast = autocast_dtype(hidden)
    dtype = hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast
    return Products(dtype, hidden.device, autocast)


def cross_entropy_rows(
    rows: Rows,
    head: Head,
    target: Tensor,
    options: ChunkOptions,
    *,
    steps: Steps = (),
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """Return the loss, the likeliest classes of the rows that count and their positions, and why a backend was left.

    Rows to ignore are dropped before anything is computed; with ``reduction="none"`` their loss is zero.
    """
    positions = None
    if not _without_values(target):
        positions = (target != ignore_index).nonzero()[:, 0]
        if positions.numel() == target.numel():
            positions = None
    num_rows = len(rows)
    if positions is not None:
        rows, target = rows.take(positions), target[positions]
    class_weight = None if class_weight is None else class_weight.detach().to(rows.products.wide)
    task = CrossEntropy(target, smoothing=smoothing, class_weight=class_weight, z_loss=z_loss)
    backend, why = choose_backend(options.backend, head, task, steps, reduction, rows.products)
    chunk = rows_in_chunk(len(rows), head.classes, rows.hidden.device, options.chunk_tokens)
    if backend == "native" or not len(rows):
        call = Call(head, task, steps, rows.index, chunk, rows.products, reduction)
        loss = run_chunked(call, rows.hidden)
    else:
        assert isinstance(head, LinearHead)
        hidden_rows = rows.hidden.reshape(-1, rows.hidden.shape[-1])
        hidden_rows = hidden_rows if rows.index is None else hidden_rows[rows.index]
        if backend == "torch":
            loss = torch_loss(head, task, hidden_rows, reduction, chunk, rows.products.dtype)
        else:
            loss = liger_loss(head, task, hidden_rows, steps, reduction, rows.products.dtype).to(rows.products.wide)
    if reduction == "none" and positions is not None:
        loss = loss.new_zeros(num_rows).index_copy(0, positions, loss)
    return loss, task.best, positions, why


def _without_values(tensor: Tensor) -> bool:
    """Return whether a tensor stands for values that do not exist (meta, fake)."""
    return tensor.is_meta or any(cls.__name__ == "FakeTensor" for cls in type(tensor).__mro__)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_tokens: int | Literal["auto"] = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Return the cross entropy of ``hidden @ weight.T + bias`` without the logits.

    Equal to ``F.cross_entropy(F.linear(hidden, weight, bias) * scale, target, ...)``. Gradients are made in the same
    pass as the loss, so that nothing of the size tokens x vocabulary is alive beyond a chunk of ``c`` rows:
    ``4 c V`` bytes of logits (``6 c V`` in 16 bits, ``4 c V`` more with ``softcap``). Kept for backward are the
    gradients of ``hidden`` and, unless frozen, of ``weight``, which is summed in fp32 and then kept in the weight's
    dtype. With ``reduction="none"`` and a trainable weight they are made in backward, by computing the chunks again.

    Args:
        hidden: ``(..., D)``.
        weight: ``(V, D)``.
        target: ``(...)`` int64 classes.
        bias: ``(V,)``.
        class_weight: ``(V,)``; a factor for each class, without gradient.
        ignore_index: Rows of this class do not count; nothing is computed for them.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: Share of the uniform distribution in the target.
        z_loss: Adds ``z_loss * logsumexp(logits) ** 2`` to the loss of every row.
        softcap: Replaces the logits z by ``softcap * tanh(z / softcap)``, after ``scale``.
        scale: Multiplies the logits.
        chunk_tokens: Rows in a chunk; ``"auto"`` bounds the bytes of a chunk.
        backend: ``native``, ``torch``, ``liger``, or ``auto`` to pick.

    Returns:
        A 0-dim tensor, or ``target.shape`` for ``reduction="none"``; fp32 (fp64 for fp64 models), also in 16 bits.

    Raises:
        ConfigurationError: If an argument is wrong; lists all problems.

    Example:
        >>> hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(32, 8)
        >>> loss = chunked_cross_entropy(hidden, weight, torch.arange(5), chunk_tokens=2)
        >>> torch.allclose(loss, F.cross_entropy(hidden @ weight.T, torch.arange(5)))
        True

    Source:
        Gradients in forward: Hsu et al. 2024 (Liger Kernel), https://arxiv.org/abs/2410.10989, section 3.2. z-loss:
        Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5.

    """
    problems = chunk_problems(chunk_tokens, backend)
    if reduction not in ("mean", "sum", "none"):
        problems.append(f'reduction={reduction!r} is not a reduction. Use one of "mean", "sum", "none".')
    if not 0.0 <= label_smoothing <= 1.0:
        problems.append(f"label_smoothing={label_smoothing!r} must be between 0 and 1.")
    if softcap is not None and softcap <= 0:
        problems.append(f"softcap={softcap!r} must be above 0, or None.")
    if target.shape != hidden.shape[:-1] or target.is_floating_point():
        problems.append(
            f"target of shape {tuple(target.shape)} and dtype {target.dtype} does not hold one class for each row of "
            f"hidden, {tuple(hidden.shape)}. Pass int64 classes of shape {tuple(hidden.shape[:-1])}."
        )
    raise_problems("chunked_cross_entropy", problems)
    steps: list[Step] = [] if scale == 1.0 else [Scale(scale)]
    if softcap is not None:
        steps += [Scale(softcap, inverse=True), Tanh(), Scale(softcap)]
    if torch.compiler.is_compiling():
        return _compiled(
            hidden, weight, target, bias, class_weight, ignore_index, reduction, label_smoothing, z_loss, steps
        )
    loss, *_ = cross_entropy_rows(
        Rows(hidden, products_of(hidden)),
        LinearHead(weight, bias, weight.shape[0]),
        target.reshape(-1),
        ChunkOptions(chunk_tokens, backend),
        steps=tuple(steps),
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _compiled(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    smoothing: float,
    z_loss: float,
    steps: list[Step],
) -> Tensor:
    """Return the loss in operations that ``torch.compile`` can plan itself."""
    z = F.linear(hidden, weight, bias).float()
    for step in steps:
        z = z.tanh() if isinstance(step, Tanh) else z / step.factor if step.inverse else z * step.factor  # type: ignore[attr-defined]
    z = z.reshape(-1, z.shape[-1])
    target = target.reshape(-1)
    losses = F.cross_entropy(
        z, target, class_weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )
    counts = target != ignore_index
    if z_loss:
        losses = losses + z_loss * z.logsumexp(-1).square() * counts
    if reduction == "none":
        return losses.view(hidden.shape[:-1])
    if reduction == "sum":
        return losses.sum()
    if class_weight is None:
        return losses.sum() / counts.sum()
    return losses.sum() / (class_weight[target.clamp_min(0)] * counts).sum()
