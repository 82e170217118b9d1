"""Host memory of this process: resident, proportional, anonymous and file-backed bytes, and the allocator in use.

The numbers come from ``/proc`` (Linux). Elsewhere only the peak resident set is known, and what is unknown is
``None``, never a guess.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_memsave.units import KIB

__all__ = [
    "HostMemory",
    "host_allocator",
    "host_available_bytes",
    "host_memory",
    "host_peak_bytes",
    "reset_host_peak",
    "shared_memory_free_bytes",
]

_PROC = Path("/proc/self")
_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


@dataclass(frozen=True)
class HostMemory:
    """Host memory of this process; ``None`` where this system does not say.

    Args:
        rss_bytes: Resident set.
        peak_rss_bytes: Highest resident set since the start of the process or the last ``reset_host_peak``.
        pss_bytes: Resident set with shared pages divided among the processes that share them.
        anonymous_bytes: Resident bytes that no file backs: tensors, Python objects.
        file_bytes: Resident bytes of mapped files: libraries, memory-mapped data; the kernel may drop them.
        shared_bytes: Resident bytes of shared memory, such as DataLoader batches in ``/dev/shm``.

    """

    rss_bytes: int | None
    peak_rss_bytes: int | None
    pss_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None
    shared_bytes: int | None


def host_memory() -> HostMemory:
    """Return the host memory of this process now.

    Example:
        >>> memory = host_memory()
        >>> memory.peak_rss_bytes is None or memory.peak_rss_bytes > 0
        True

    """
    status = _kib_fields(_PROC / "status")
    rollup = _kib_fields(_PROC / "smaps_rollup")
    return HostMemory(
        rss_bytes=status.get("VmRSS"),
        peak_rss_bytes=status.get("VmHWM", _peak_from_rusage()),
        pss_bytes=rollup.get("Pss"),
        anonymous_bytes=status.get("RssAnon"),
        file_bytes=status.get("RssFile"),
        shared_bytes=status.get("RssShmem"),
    )


def host_peak_bytes() -> int:
    """Return the highest resident set, zero where this system does not say; cheaper than ``host_memory``."""
    return _kib_fields(_PROC / "status").get("VmHWM") or _peak_from_rusage() or 0


def reset_host_peak() -> bool:
    """Let the peak resident set start again from the present resident set.

    Returns:
        False where the system does not allow it: the peak is then the one since the process began.

    """
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def host_allocator() -> str | None:
    """Return the name of the process allocator.

    One of glibc, musl, tcmalloc, jemalloc and mimalloc. It decides how much of the freed memory stays in the resident
    set, so resident sets are comparable only under the same allocator. ``None`` where this system does not say.
    """
    try:
        maps = (_PROC / "maps").read_text()
    except OSError:
        return None
    libraries = {os.path.basename(line.split()[-1]) for line in maps.splitlines() if "/" in line}
    preloaded = [os.path.basename(path) for path in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    # A preloaded library serves the process. One that a dependency merely brought along does not, as a rule.
    for name in _ALLOCATORS:
        if any(name in library for library in preloaded) and any(name in library for library in libraries):
            return name
    if any(library.startswith(("libc.so.6", "libc-2.")) for library in libraries):
        return "glibc"
    if any(library.startswith(("ld-musl", "libc.musl")) for library in libraries):
        return "musl"
    return None


def host_available_bytes() -> int | None:
    """Return the bytes that new allocations may still take: of this machine, or of this container if that is less.

    ``None`` where this system does not say.
    """
    machine = _kib_fields(_PROC.parent / "meminfo").get("MemAvailable")
    known = [size for size in (machine, _cgroup_available()) if size is not None]
    return min(known) if known else None


def shared_memory_free_bytes() -> int | None:
    """Return the free bytes of ``/dev/shm``, through which DataLoader workers pass batches; ``None`` without it."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


_CGROUPS = (  # limit, used, statistics, the key of what the kernel can drop
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def _cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container's limit leaves; ``None`` without a limit."""
    for limit, used, statistics, droppable in _CGROUPS:
        try:
            most = (root / limit).read_text().strip()
            if not most.isdigit():  # "max"
                return None
            lines = dict(line.split()[:2] for line in (root / statistics).read_text().splitlines())
            taken = int((root / used).read_text()) - int(lines.get(droppable, 0))
        except (OSError, ValueError):
            continue
        return max(0, int(most) - taken)
    return None


def _kib_fields(path: Path) -> dict[str, int]:
    """Return the ``Name:  123 kB`` lines of a ``/proc`` file in bytes; nothing where there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    fields = {}
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            fields[words[0].rstrip(":")] = int(words[1]) * KIB
    return fields


def _peak_from_rusage() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB
