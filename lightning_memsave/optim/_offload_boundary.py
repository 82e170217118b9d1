"""Copies between the memory a module trains in and host memory, and the staging memory they pass through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Boundary", "CudaBoundary", "Slot", "Ticket", "boundary_of", "room_for", "view_like"]

Pairs = Sequence[tuple[Tensor, Tensor]]

_ALIGNMENT = 64  # bytes; what vectorized kernels like


class Ticket:
    """Copies on their way."""

    def wait(self) -> None:
        """Block this thread until they are done."""


class Boundary:
    """Copies that are done when the call returns, on any device.

    A subclass may let them run on: they start after the work already queued on the current stream, in the order of
    the calls, and ``finish`` makes what is queued later see the uploads.
    """

    fuses = False  # the host has torch's fused kernels, and bits need not equal those of the device anyway

    def holds(self, device: torch.device) -> bool:
        """Return whether memory of this device is on the far side."""
        return device.type != "cpu"

    def buffer(self, num_bytes: int) -> Tensor:
        """Return host memory for copies."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def download(self, pairs: Pairs) -> Ticket:
        """Copy ``(device tensor, host tensor)`` pairs to the host."""
        return self._copy(pairs)

    def upload(self, pairs: Pairs) -> Ticket:
        """Copy ``(host tensor, device tensor)`` pairs to the device."""
        return self._copy(pairs)

    def finish(self) -> None:
        """Make the device's later work wait for the uploads."""

    @staticmethod
    def _copy(pairs: Pairs) -> Ticket:
        with torch.no_grad():
            for source, target in pairs:
                target.copy_(source)
        return Ticket()


class _CudaTicket(Ticket):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        self._event.synchronize()


class CudaBoundary(Boundary):
    """Copies on a stream of their own, from and to pinned memory.

    Args:
        device: The device of the parameters.

    """

    fuses = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, num_bytes: int) -> Tensor:
        """Return pinned host memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def download(self, pairs: Pairs) -> Ticket:
        """Copy to the host."""
        return self._queue(pairs)

    def upload(self, pairs: Pairs) -> Ticket:
        """Copy to the device."""
        return self._queue(pairs)

    def _queue(self, pairs: Pairs) -> Ticket:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                for tensor in (source, target):
                    if tensor.is_cuda:  # its memory is not given to others before the copy is done
                        tensor.record_stream(self.stream)
        return _CudaTicket(self.stream)

    def finish(self) -> None:
        """Let the current stream wait for the copies."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def boundary_of(device: torch.device) -> Boundary | None:
    """Return the boundary between a device and the host; ``None`` for the host itself.

    Example:
        >>> boundary_of(torch.device("cpu")) is None
        True

    """
    if device.type == "cpu":
        return None
    return CudaBoundary(device) if device.type == "cuda" else Boundary()


class Slot:
    """Staging memory that is used again and again; it grows to the largest use.

    Args:
        boundary: Makes the memory.

    """

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0
        self.ticket = Ticket()  # of the last copies from or to this memory

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._memory.nbytes

    def open(self, sizes: Iterable[int]) -> None:
        """Wait for the last use, then make room for tensors of these bytes."""
        self.reserve(room_for(sizes))
        self._used = 0

    def reserve(self, num_bytes: int) -> None:
        """Wait for the last use, then see that there are so many bytes."""
        self.ticket.wait()
        if self._memory.nbytes < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # freed before the larger one is made
            self._memory = self._boundary.buffer(num_bytes)

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a part of the memory as a host tensor of the same shape and layout."""
        part = view_like(self._memory[self._used :], tensor, dtype)
        self._used += _aligned(part.nbytes)
        return part


def view_like(memory: Tensor, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the beginning of ``memory`` (bytes) as a tensor of the shape and layout of ``tensor``."""
    dtype = dtype or tensor.dtype
    layout = torch.empty_like(tensor, device="meta").stride()  # dense, whatever the tensor is
    return memory[: tensor.numel() * dtype.itemsize].view(dtype).as_strided(tensor.shape, layout)


def room_for(sizes: Iterable[int]) -> int:
    """Return the bytes that tensors of these sizes take in a slot."""
    return sum(_aligned(size) for size in sizes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
