"""Give freed host memory back to the system while a process trains."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

from lightning_memsave.memory.host import host_allocator
from lightning_memsave.units import format_bytes

__all__ = ["HeapTrimmer", "heap_release"]

_STATM = Path("/proc/self/statm")
_POLL_SECONDS = 0.02
_ALL_ARENAS = 4096  # jemalloc's MALLCTL_ARENAS_ALL


def heap_release(heap: str | None = None) -> Callable[[], object] | None:
    """Return the call that gives the process heap's free pages back to the system.

    Args:
        heap: Name of the allocator; ``None`` asks the process.

    Returns:
        ``None`` where the allocator has no such call.

    """
    process = ctypes.CDLL(None)
    heap = host_allocator() if heap is None else heap
    if heap == "glibc" and hasattr(process, "malloc_trim"):
        return lambda: process.malloc_trim(0)
    if heap == "tcmalloc" and hasattr(process, "MallocExtension_ReleaseFreeMemory"):
        return lambda: process.MallocExtension_ReleaseFreeMemory()
    if heap == "jemalloc" and hasattr(process, "mallctl"):
        name = f"arena.{_ALL_ARENAS}.purge".encode()
        return lambda: process.mallctl(name, None, None, None, ctypes.c_size_t(0))
    if heap == "mimalloc" and hasattr(process, "mi_collect"):
        return lambda: process.mi_collect(ctypes.c_bool(True))
    return None


class HeapTrimmer:
    """Give freed host memory back each time the process has grown by ``growth_bytes``.

    glibc serves blocks below 32 MiB from a heap, and a freed block between two used ones stays resident. A thread
    watches the resident set and releases the free pages when it has grown: the peak is then what is in use and at
    most ``growth_bytes`` more, plus what is allocated between two looks (20 ms).

    Args:
        growth_bytes: Growth of the resident set since it was last lowest, from which freed pages are given back.

    """

    def __init__(self, growth_bytes: int) -> None:
        self.growth_bytes = growth_bytes
        self.num_releases = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Begin to watch.

        Returns:
            What is done from now on, for people; nothing is done where the system or the heap does not allow it.

        """
        heap = host_allocator()
        release = heap_release(heap) if _STATM.exists() else None
        if release is None:
            return f"host_trim has no effect: no way is known to trim {heap or 'the heap of this system'}"
        self._thread = threading.Thread(target=self._watch, args=(release,), name="memsave-host-trim", daemon=True)
        self._thread.start()
        return f"freed host memory is given back for every {format_bytes(self.growth_bytes)} of growth ({heap})"

    def close(self) -> None:
        """Stop watching; a second call does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, release: Callable[[], object]) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with _STATM.open("rb", buffering=0) as statm:

            def resident() -> int:
                statm.seek(0)
                return int(statm.read(128).split()[1]) * page

            lowest = resident()
            while not self._stop.wait(_POLL_SECONDS):
                now = resident()
                lowest = min(lowest, now)
                if now - lowest >= self.growth_bytes:
                    release()
                    self.num_releases += 1
                    lowest = resident()
