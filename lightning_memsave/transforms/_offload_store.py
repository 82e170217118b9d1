"""Where activations go while they are not needed: host memory or files, in buffers that are used again."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim._offload_boundary import Boundary, Ticket

__all__ = ["ActivationStore", "DiskStore", "HostStore"]


class ActivationStore:
    """Buffers of bytes away from the device.

    A buffer belongs to one caller from ``put`` until ``release``; released ones are given out again.

    Args:
        budget: Bytes it may hold; ``put`` answers ``None`` beyond.

    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.held_bytes = 0
        self.used_bytes = 0
        self.peak_bytes = 0
        self.stored = 0  # how many were put
        self.refused = 0  # how many did not fit into the budget
        self._free: dict[int, list[Any]] = defaultdict(list)

    def put(self, data: Tensor) -> Any | None:
        """Copy ``(n,)`` uint8 bytes away and return their buffer, or ``None`` if the budget is spent."""
        size = data.nbytes
        if self._free[size]:
            buffer = self._free[size].pop()
        elif self.budget is not None and self.held_bytes + size > self.budget and not self._make_room(size):
            self.refused += 1
            return None
        else:
            buffer = self._make(size)
            self.held_bytes += size
        self._write(buffer, data)
        self.stored += 1
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return buffer

    def release(self, buffer: Any, size: int) -> None:
        """Take a buffer back."""
        self.used_bytes -= size
        self._free[size].append(buffer)

    def _make_room(self, size: int) -> bool:
        """Drop unused buffers of other sizes until ``size`` fits."""
        assert self.budget is not None
        for other, buffers in self._free.items():
            while buffers and self.held_bytes + size > self.budget:
                self._drop(buffers.pop())
                self.held_bytes -= other
        return self.held_bytes + size <= self.budget

    def fetch(self, buffer: Any, size: int, device: torch.device) -> Any:
        """Begin to bring the bytes back; ``take`` returns them."""
        raise TypeError

    def take(self, fetched: Any) -> Tensor:
        """Return fetched bytes as a ``(n,)`` uint8 tensor on the device, ready for the current stream."""
        raise TypeError

    def close(self) -> None:
        """Free what is not in use."""
        for buffers in self._free.values():
            while buffers:
                self._drop(buffers.pop())
        self._free.clear()

    def _make(self, size: int) -> Any:
        raise TypeError

    def _write(self, buffer: Any, data: Tensor) -> None:
        raise TypeError

    def _drop(self, buffer: Any) -> None:
        pass


class HostStore(ActivationStore):
    """Host memory: pinned, and copied on a stream of its own, where the device is CUDA.

    Args:
        boundary: Copies between the device and the host.
        budget: Bytes it may hold.

    """

    def __init__(self, boundary: Boundary, budget: int | None = None) -> None:
        super().__init__(budget)
        self.boundary = boundary

    def _make(self, size: int) -> Tensor:
        return self.boundary.buffer(size)

    def _write(self, buffer: Tensor, data: Tensor) -> None:
        self.boundary.download([(data, buffer)])

    def fetch(self, buffer: Tensor, size: int, device: torch.device) -> tuple[Tensor, Ticket]:
        """Begin the copy to the device."""
        target = torch.empty(size, dtype=torch.uint8, device=device)
        return target, self.boundary.upload([(buffer, target)])

    def take(self, fetched: tuple[Tensor, Ticket]) -> Tensor:
        """Let the current stream wait for the copy."""
        self.boundary.finish()
        return fetched[0]


class DiskStore(ActivationStore):
    """Files in a directory of this process; they are read back by a thread, ahead of their use.

    Args:
        directory: Where to make the directory of this process.
        budget: Bytes it may hold.

    """

    def __init__(self, directory: str | Path, budget: int | None = None) -> None:
        super().__init__(budget)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix="memsave-activations-", dir=directory))
        self._count = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="memsave-activations")

    def _make(self, size: int) -> Path:
        self._count += 1
        return self.directory / f"{self._count}.bin"

    def _write(self, buffer: Path, data: Tensor) -> None:
        # the mapping is gone after the copy: its pages are the system's cache, not this process's memory
        torch.from_file(str(buffer), shared=True, size=data.nbytes, dtype=torch.uint8).copy_(data)

    def fetch(self, buffer: Path, size: int, device: torch.device) -> Future[Tensor]:
        """Begin to read."""

        def read() -> Tensor:
            mapped = torch.from_file(str(buffer), shared=True, size=size, dtype=torch.uint8)
            return mapped.to(device, copy=True)

        return self._reader.submit(read)

    def take(self, fetched: Future[Tensor]) -> Tensor:
        """Wait for the bytes."""
        return fetched.result()

    def _drop(self, buffer: Path) -> None:
        buffer.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files and end the thread."""
        super().close()
        self._reader.shutdown(wait=True)
        shutil.rmtree(self.directory, ignore_errors=True)
