"""Hold gradients between the backwards of an accumulation window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_memsave.errors import ConfigurationError

__all__ = ["HeldGradients", "as_stepped", "local_part"]


def local_part(x: Tensor) -> Tensor:
    """Return the rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def as_stepped(p: Tensor) -> Tensor:
    """Return the gradient of ``p``, split over the ranks as ``p`` is: sums that are pending are done now."""
    g = p.grad
    assert g is not None
    if isinstance(g, DTensor) and isinstance(p, DTensor) and g.placements != p.placements:
        p.grad = g = g.redistribute(p.device_mesh, p.placements)
    return g


class HeldGradients:
    """Sums of gradients that are no parameter's ``.grad``, so that no step can see them.

    Sums have the gradients' own dtype and are made in the same order as ``p.grad += g``: bitwise those of ordinary
    accumulation.

    Args:
        where: ``host`` keeps them in host memory (pinned beside a CUDA device; copies are asynchronous and sums are
            made on the device, so that nothing waits), ``device`` beside the parameters.

    """

    def __init__(self, where: str) -> None:
        self._on_host = where == "host"
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._buffers: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Return how many parameters have a held gradient."""
        return len(self._held)

    def __contains__(self, p: Tensor) -> bool:
        """Return whether a parameter has one."""
        return id(p) in self._held

    def add(self, p: Tensor) -> None:
        """Take ``p.grad`` into the sum; it is ``None`` afterwards."""
        g = as_stepped(p)
        if not self._on_host:
            held = self._held.get(id(p))
            self._held[id(p)] = (p, g if held is None else held[1].add_(g))
        else:
            self._held[id(p)] = p, self._to_host(p, self.join(p))
        p.grad = None

    def _to_host(self, p: Tensor, g: Tensor) -> Tensor:
        if g.layout != torch.strided:
            raise ConfigurationError(
                "GradientRelease: sparse gradients cannot be accumulated in host memory. "
                "Write accumulate='device', or sparse=False in the embedding."
            )
        local = local_part(g)
        buffer = self._buffers.get(id(p))
        if buffer is None or buffer.dtype != local.dtype or buffer.shape != local.shape:
            pinned = local.device.type == "cuda"
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=pinned)
            self._buffers[id(p)] = buffer
        # The stream orders this copy before the next backward reads the buffer, and before g's memory is used again.
        return buffer.copy_(local, non_blocking=True)

    def join(self, p: Tensor) -> Tensor:
        """Add what is held for ``p`` to its gradient, in place, and keep it; return the gradient."""
        g = as_stepped(p)
        held = self._held.get(id(p))
        if held is not None and self._on_host:
            local = local_part(g)
            local.add_(held[1].to(local.device, non_blocking=True))
        elif held is not None:
            g.add_(held[1])
        return g

    def copy(self, p: Tensor) -> Tensor:
        """Return what is held for a parameter as a gradient of its own."""
        held = self._held[id(p)][1]
        g = torch.empty_like(p)
        local_part(g).copy_(local_part(held), non_blocking=True)
        return g

    def norm(self, p: Tensor) -> Tensor:
        """Return the norm of what is held for a parameter whose gradient is ``None``."""
        self._make_gradient(p)
        assert p.grad is not None
        norm: Tensor = torch.linalg.vector_norm(p.grad)
        p.grad = None
        return norm

    def take(self, p: Tensor) -> None:
        """Add what is held for ``p`` to its gradient, or make it the gradient, and forget it."""
        if p.grad is not None:
            self.join(p)
        else:
            self._make_gradient(p)
        self._held.pop(id(p), None)

    def _make_gradient(self, p: Tensor) -> None:
        held = self._held[id(p)][1]
        if not self._on_host:
            p.grad = held
            return
        p.grad = torch.empty_like(p)
        local_part(p.grad).copy_(held, non_blocking=True)

    def clear(self) -> None:
        """Forget all sums; host buffers are kept for the next window."""
        self._held.clear()

    def close(self) -> None:
        """Free the host buffers as well."""
        self._held.clear()
        self._buffers.clear()
