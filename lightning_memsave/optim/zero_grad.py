"""Free gradients as soon as they have been used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.optim._shard_checkpoint import local_part

__all__ = ["StepWatch", "drop_gradients", "gradient_bytes"]


def _parameters(optimizers: Iterable[Optimizer]) -> Iterable[Tensor]:
    return (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])


def drop_gradients(optimizers: Iterable[Optimizer]) -> None:
    """Set the gradient of every parameter of the optimizers to ``None``, in place."""
    for p in _parameters(optimizers):
        p.grad = None


def gradient_bytes(optimizers: Iterable[Optimizer], *, expected: bool = False) -> int:
    """Return the bytes of the gradients that this rank holds, or (``expected``) that a whole backward will hold.

    Args:
        optimizers: Their parameters are counted, each once.
        expected: Count every trainable parameter instead of the gradients that are there.

    """
    parameters = {id(p): p for p in _parameters(optimizers)}.values()
    if expected:
        return sum(local_part(p).nbytes for p in parameters if p.requires_grad)
    return sum(local_part(p.grad).nbytes for p in parameters if p.grad is not None)


class StepWatch:
    """Know which optimizers have really stepped: a scaler that found infinities, or a user's override, may not.

    Args:
        optimizers: Watched until ``close``.

    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._stepped: dict[int, Optimizer] = {}
        self._handles = [optimizer.register_step_post_hook(self._note) for optimizer in optimizers]

    def _note(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._stepped[id(optimizer)] = optimizer

    def take(self) -> list[Optimizer]:
        """Return the optimizers that stepped since the last call."""
        stepped = list(self._stepped.values())
        self._stepped.clear()
        return stepped

    def close(self) -> None:
        """Stop watching; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
