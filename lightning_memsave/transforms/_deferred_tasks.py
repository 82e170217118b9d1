"""What is computed from one chunk of logits: a loss, a log-sum-exp, a choice of values, and their gradients.

A task is given the logits of a chunk, ``(c, V)`` in fp32 (fp64 for fp64 models), and may destroy them. Nothing here
knows where the logits come from.
"""

# N = rows of the call, c = rows of the chunk, V = vocabulary, K = values picked per row; z: logits, dz: gradient

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CrossEntropy", "LogSumExp", "Picked", "Scale", "Shift", "Step", "Steps", "Tanh", "Task"]


# -- what happens to logits between the head and the loss -----------------------------------------------------------
class Step(Protocol):
    """An elementwise change of the logits."""

    def forward(self, z: Tensor) -> Tensor | None:
        """Change the logits in place; return what ``backward`` needs."""

    def backward(self, dz: Tensor, kept: Tensor | None) -> None:
        """Change the gradient in place."""


@dataclass(frozen=True)
class Scale:
    """Multiply by a number, or by a 0-dim tensor without gradient; ``inverse`` divides."""

    factor: float | Tensor
    inverse: bool = False

    def forward(self, z: Tensor) -> Tensor | None:
        """Scale the logits."""
        z.div_(self.factor) if self.inverse else z.mul_(self.factor)
        return None

    def backward(self, dz: Tensor, kept: Tensor | None) -> None:
        """Scale the gradient."""
        self.forward(dz)


@dataclass(frozen=True)
class Shift:
    """Add a ``(V,)`` tensor without gradient."""

    values: Tensor

    def forward(self, z: Tensor) -> Tensor | None:
        """Shift the logits."""
        z.add_(self.values)
        return None

    def backward(self, dz: Tensor, kept: Tensor | None) -> None:
        """Leave the gradient as it is."""


@dataclass(frozen=True)
class Tanh:
    """Squash the logits; one more chunk is alive until its gradient is made."""

    def forward(self, z: Tensor) -> Tensor | None:
        """Squash the logits."""
        return z.tanh_().clone()

    def backward(self, dz: Tensor, kept: Tensor | None) -> None:
        """Multiply by ``1 - tanh^2``."""
        assert kept is not None
        dz.mul_(kept.square_().neg_().add_(1))


Steps = tuple[Step, ...]


# -- what is made of the logits -------------------------------------------------------------------------------------
class Task(Protocol):
    """One value, or several, of every row."""

    row_scaled: bool  # the gradient of a row is proportional to one upstream number of that row

    def output(self, num_rows: int, like: Tensor) -> Tensor:
        """Return an empty result for all rows."""

    def value(self, z: Tensor, rows: slice) -> Tensor:
        """Return the values of a chunk."""

    def value_and_grad(self, z: Tensor, rows: slice, upstream: Tensor | None) -> Tensor:
        """Return the values of a chunk, and leave their gradient in its logits.

        ``upstream`` is the gradient of the values of these rows; ``None`` means one.
        """


class CrossEntropy:
    """Cross entropy of every row against its class, as ``F.cross_entropy`` defines it, plus ``z_loss * lse^2``.

    Args:
        target: Classes, int64, nothing to ignore among them.
        smoothing: Label smoothing.
        class_weight: A factor for each class, or ``None``.
        z_loss: Factor of the squared log-sum-exp.

    """

    row_scaled = True

    def __init__(
        self, target: Tensor, *, smoothing: float = 0.0, class_weight: Tensor | None = None, z_loss: float = 0.0
    ) -> None:
        self.target = target
        self.smoothing = smoothing
        self.class_weight = class_weight
        self.z_loss = z_loss
        self.best: Tensor | None = None  # the likeliest class of every row, a by-product
        if class_weight is None:
            self.row_weight = None
            self.weight_sum: Tensor | None = None
        else:
            self.row_weight = class_weight[target]
            self.weight_sum = class_weight.sum()

    def normalizer(self, like: Tensor) -> Tensor:
        """Return what the mean divides by: the number of rows, or the sum of their weights."""
        if self.row_weight is not None:
            return self.row_weight.sum()
        return torch.full((), float(self.target.numel()), dtype=like.dtype, device=like.device)

    def output(self, num_rows: int, like: Tensor) -> Tensor:
        """Return ``(N,)``."""
        self.best = torch.empty(num_rows, dtype=torch.int64, device=like.device)
        return torch.empty(num_rows, dtype=like.dtype, device=like.device)

    def value(self, z: Tensor, rows: slice) -> Tensor:
        """Return the losses of a chunk."""
        return self._run(z, rows)[0]

    def value_and_grad(self, z: Tensor, rows: slice, upstream: Tensor | None) -> Tensor:
        """Return the losses of a chunk, and leave their gradient in its logits."""
        loss, lse, total = self._run(z, rows)
        target = self.target[rows]
        keep = 1.0 - self.smoothing
        picked = torch.full_like(total, keep) if self.row_weight is None else self.row_weight[rows] * keep
        every = picked
        if self.smoothing:
            share = self.smoothing / z.shape[1]
            every = picked + (self.smoothing if self.weight_sum is None else share * self.weight_sum)
        if self.z_loss:
            every = every + 2.0 * self.z_loss * lse
        if upstream is not None:
            picked, every = picked * upstream, every * upstream
        # In place, so that the chunk is the only thing of this size: z holds exp(z - max), whose sum is known.
        z.mul_((every / total)[:, None])
        z.scatter_add_(1, target[:, None], -picked[:, None])
        if self.smoothing:
            self._subtract_share(z, upstream)
        return loss

    def _run(self, z: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses, log-sum-exps and sums of exponentials; the logits become ``exp(z - max)``."""
        target = self.target[rows]
        top, best = z.max(dim=1)
        if self.best is not None:
            self.best[rows] = best
        z.sub_(top[:, None])
        picked = z.gather(1, target[:, None])[:, 0]
        spread = self._spread(z) if self.smoothing else None
        total = z.exp_().sum(dim=1)
        log = total.log()
        loss = log - picked
        if self.row_weight is not None:
            loss = loss * self.row_weight[rows]
        if spread is not None:
            of_all: float | Tensor = z.shape[1] if self.weight_sum is None else self.weight_sum
            smooth = (log * of_all - spread) * (self.smoothing / z.shape[1])
            loss = loss * (1.0 - self.smoothing) + smooth
        lse = log + top
        if self.z_loss:
            loss = loss + self.z_loss * lse.square()
        return loss, lse, total

    def _spread(self, z: Tensor) -> Tensor:
        return z.sum(dim=1) if self.class_weight is None else z @ self.class_weight

    def _subtract_share(self, dz: Tensor, upstream: Tensor | None) -> None:
        share = self.smoothing / dz.shape[1]
        if self.class_weight is None:
            dz.sub_(share if upstream is None else upstream[:, None] * share)
        elif upstream is None:
            dz.sub_(self.class_weight * share)
        else:
            dz.addr_(upstream, self.class_weight, alpha=-share)


class LogSumExp:
    """``logsumexp`` of every row."""

    row_scaled = True

    def output(self, num_rows: int, like: Tensor) -> Tensor:
        """Return ``(N,)``."""
        return torch.empty(num_rows, dtype=like.dtype, device=like.device)

    def value(self, z: Tensor, rows: slice) -> Tensor:
        """Return the values of a chunk."""
        return self._run(z)[0]

    def value_and_grad(self, z: Tensor, rows: slice, upstream: Tensor | None) -> Tensor:
        """Return the values of a chunk, and leave their gradient in its logits."""
        lse, total = self._run(z)
        scale = total.reciprocal() if upstream is None else upstream / total
        z.mul_(scale[:, None])
        return lse

    def _run(self, z: Tensor) -> tuple[Tensor, Tensor]:
        top = z.amax(dim=1)
        total = z.sub_(top[:, None]).exp_().sum(dim=1)
        return total.log() + top, total


class Picked:
    """The logits of some classes of every row: ``gather``.

    Args:
        classes: Classes, int64.

    """

    row_scaled = False

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes

    def output(self, num_rows: int, like: Tensor) -> Tensor:
        """Return ``(N, K)``."""
        return torch.empty(num_rows, self.classes.shape[1], dtype=like.dtype, device=like.device)

    def value(self, z: Tensor, rows: slice) -> Tensor:
        """Return the values of a chunk."""
        return z.gather(1, self.classes[rows])

    def value_and_grad(self, z: Tensor, rows: slice, upstream: Tensor | None) -> Tensor:
        """Return the values of a chunk, and leave their gradient in its logits."""
        values = self.value(z, rows)
        z.zero_()
        upstream = torch.ones_like(values) if upstream is None else upstream
        z.scatter_add_(1, self.classes[rows], upstream)
        return values
