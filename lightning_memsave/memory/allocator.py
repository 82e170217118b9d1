"""Settings of the two allocators a training process has: the accelerator's cache and the C library's heap."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

import torch

from lightning_memsave.memory.host import host_allocator
from lightning_memsave.units import format_bytes

__all__ = [
    "allocator_configuration",
    "empty_cache",
    "mmap_threshold_problems",
    "restore_configuration",
    "set_expandable_segments",
    "set_mmap_threshold",
    "with_expandable_segments",
]

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# constants of <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_MAX = 32 * 2**20  # glibc refuses larger ones on 64-bit machines


# -- the accelerator's cache -------------------------------------------------------------------------------------------
def allocator_configuration(environment: Mapping[str, str] | None = None) -> str:
    """Return the caching allocator's configuration in force, e.g. ``"max_split_size_mb:128"``.

    Args:
        environment: Read instead of the process's, and instead of what was set at run time.

    Example:
        >>> allocator_configuration({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"})
        'max_split_size_mb:128'

    """
    if environment is None:
        getter = getattr(
            torch._C, "_accelerator_getAllocatorSettings", None
        )  # torch >= 2.9; also sees run-time changes
        if getter is not None and getter():
            return str(getter())
        environment = os.environ
    return next((environment[name] for name in _VARIABLES if environment.get(name)), "")


def with_expandable_segments(configuration: str) -> str:
    """Return ``configuration`` with expandable segments on: torch resets what a new setting does not name.

    Example:
        >>> with_expandable_segments("max_split_size_mb:128")
        'max_split_size_mb:128,expandable_segments:True'

    """
    return ",".join(part for part in (configuration.strip(" ,"), "expandable_segments:True") if part)


def set_expandable_segments(device: torch.device) -> tuple[str, str | None]:
    """Let the caching allocator of ``device`` grow its segments instead of adding new ones, where it can.

    Returns:
        What was done, for people, and the configuration to go back to (``None`` if nothing was changed).

    """
    if device.type != "cuda":
        return f"expandable segments do nothing on {device.type}: it has no caching allocator to set", None
    before = allocator_configuration()
    if "expandable_segments" in before:
        return f"expandable segments left as they are set: {before!r}", None
    if "cudaMallocAsync" in before:
        return "expandable segments do not apply to backend:cudaMallocAsync", None
    reserved = torch.cuda.memory_reserved(device)
    _configure(with_expandable_segments(before))
    done = "expandable segments on"
    if reserved:
        done += (
            f", too late for {format_bytes(reserved)} that are reserved already: they keep their fixed segments. "
            "Set PYTORCH_ALLOC_CONF=expandable_segments:True before the process starts"
        )
    return done, before


def restore_configuration(before: str) -> None:
    """Go back to the configuration ``set_expandable_segments`` found; memory that is held stays as it is."""
    _configure(",".join(part for part in (before.strip(" ,"), "expandable_segments:False") if part))


def _configure(configuration: str) -> None:
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    setter(configuration)


def empty_cache(device: torch.device) -> int:
    """Give the cached, unused memory of a CUDA device back to it.

    Returns:
        Bytes given back; zero on a device without a cache.

    """
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    return before - torch.cuda.memory_reserved(device)


# -- the heap ----------------------------------------------------------------------------------------------------------
def set_mmap_threshold(threshold_bytes: int) -> str:
    """Make glibc map blocks of ``threshold_bytes`` and more on their own, so that freeing them returns them at once.

    By default glibc raises this threshold up to 32 MiB as large blocks are freed; the blocks below it fragment a
    heap that cannot be given back. The setting lasts as long as the process.

    Returns:
        What was done, for people; nothing is done where another heap is loaded.

    Source:
        mallopt(3), M_MMAP_THRESHOLD.

    """
    heap = host_allocator()
    if heap != "glibc":
        found = heap or "a heap that is not known here"
        return f"host_mmap_threshold has no effect: this process uses {found}, and only glibc's heap has that setting"
    libc = ctypes.CDLL(None)
    # the trim threshold follows the mmap threshold only while glibc adjusts both itself
    if not (libc.mallopt(_M_MMAP_THRESHOLD, threshold_bytes) and libc.mallopt(_M_TRIM_THRESHOLD, threshold_bytes)):
        return f"host_mmap_threshold has no effect: glibc refused {format_bytes(threshold_bytes)}"
    libc.malloc_trim(0)
    return f"host blocks of {format_bytes(threshold_bytes)} and more are returned when freed (glibc mallopt)"


def mmap_threshold_problems(threshold_bytes: int) -> list[str]:
    """Return what is wrong with a threshold: glibc takes a page up to 32 MiB.

    Example:
        >>> mmap_threshold_problems(16 * 2**20)
        []

    """
    if 4096 <= threshold_bytes <= _MMAP_THRESHOLD_MAX:
        return []
    return [
        f"host_mmap_threshold={format_bytes(threshold_bytes)}: glibc takes 4 KiB to 32 MiB. "
        'Write "16MiB" (no time cost measured) or "4MiB" (less memory, 4 % slower).'
    ]
