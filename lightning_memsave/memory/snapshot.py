"""CUDA's caching allocator: recording a snapshot, and what it reserved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lightning_memsave.errors import ConfigurationError

__all__ = ["cuda_in_use", "record_snapshot", "require_cuda", "requested_bytes", "reserved_peak_bytes"]

_MAX_ENTRIES = 200_000


def require_cuda(subject: str) -> None:
    """Raise unless a CUDA device can be used.

    Raises:
        ConfigurationError: If there is none.

    """
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"{subject}: a snapshot of the CUDA allocator was asked for, and this process has no CUDA device. "
            "Leave snapshot=False: the tracked peak, the timeline and the host's memory need no GPU."
        )


@contextmanager
def record_snapshot(path: Path, *, max_entries: int = _MAX_ENTRIES) -> Iterator[None]:
    """Record every allocation of the CUDA allocator inside of the block.

    The file is written also if the block raises. Open the file at https://pytorch.org/memory_viz (the page works
    offline; nothing is uploaded).

    Args:
        path: Where to write the pickle.
        max_entries: Events kept; older ones are dropped.

    Raises:
        ConfigurationError: If there is no CUDA device.

    """
    require_cuda("record_snapshot")
    torch.cuda.memory._record_memory_history(max_entries=max_entries)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)


def cuda_in_use() -> bool:
    """Return whether this process works with CUDA; asking does not initialise it."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def requested_bytes() -> int | None:
    """Return the bytes that tensors on the present CUDA device asked for, unrounded; ``None`` without CUDA in use."""
    if not cuda_in_use():
        return None
    return int(torch.cuda.memory_stats().get("requested_bytes.all.current", 0))


def reserved_peak_bytes() -> int | None:
    """Return the most bytes CUDA's allocator took from the device, since its counters were last reset.

    ``None`` without CUDA in use. The counters are the user's: nothing here resets them.
    """
    if not cuda_in_use():
        return None
    return int(torch.cuda.max_memory_reserved())
