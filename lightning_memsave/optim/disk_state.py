"""Optimizer state in memory-mapped files: any file system, no compiler, the bits of the state in memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory.heap_trim import heap_release
from lightning_memsave.optim._offload_boundary import view_like
from lightning_memsave.units import MIB, format_bytes

__all__ = ["MIN_FILE_BYTES", "DiskState", "directory_problems", "disk_free_bytes", "is_in_memory"]

MIN_FILE_BYTES = mmap.PAGESIZE  # a smaller tensor would take a page of memory and a file for nothing
_TRIM_BYTES = 32 * MIB  # of freed memory, at most, that the heap keeps while state moves into files
_ZEROS = 4 * MIB


class DiskState:
    """Keep tensors in files, and their pages out of this process between uses.

    A file has no name from the moment it is mapped: it is gone when its tensor is, also after ``kill -9``. Its blocks
    are reserved when it is made, so that a full disk is an error then, not a crash in a later step.

    Args:
        directory: Made if it does not exist; each process has files of its own.

    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._mappings = WeakTensorKeyDictionary()
        self._moved = 0  # bytes that were in memory first, since the heap was last asked for them
        self._free_heap = heap_release()

    @property
    def nbytes(self) -> int:
        """Bytes of all files that are alive."""
        return sum(tensor.nbytes for tensor in list(self._mappings))

    def keep(self, state: Any) -> Any:
        """Move the tensors of a state into files, and drop the pages of those that are there already.

        Args:
            state: A tensor, or dicts and lists of them, changed in place.

        Returns:
            The state itself, or the tensor that replaces it.

        """
        if isinstance(state, Tensor):
            return self._keep_tensor(state)
        if isinstance(state, dict):
            for key, value in state.items():
                state[key] = self.keep(value)
        elif isinstance(state, list):
            state[:] = [self.keep(value) for value in state]
        return state

    def fetch(self, state: Mapping[str, Any]) -> None:
        """Map the pages of a state that is about to be used at once: three times faster than one by one."""
        for value in state.values():
            if isinstance(value, Tensor) and value in self._mappings:
                _map_pages(value)

    def trim(self) -> None:
        """Give the system the memory in which tensors were before they came into files."""
        if self._moved and self._free_heap is not None:
            self._free_heap()
        self._moved = 0

    def release(self) -> None:
        """Drop the pages of all files from this process, e.g. after a checkpoint has read them."""
        for tensor in list(self._mappings):
            _drop_pages(tensor)

    def _keep_tensor(self, tensor: Tensor) -> Tensor:
        if tensor in self._mappings:
            _drop_pages(tensor)
            return tensor
        if tensor.layout != torch.strided or tensor.nbytes < MIN_FILE_BYTES:
            return tensor
        kept = view_like(self._map(tensor.nbytes), tensor)
        self._mappings[kept] = kept.nbytes
        kept.copy_(tensor.detach())
        _drop_pages(kept)
        self._moved += kept.nbytes
        if self._moved > _TRIM_BYTES:
            self.trim()
        return kept

    def _map(self, num_bytes: int) -> Tensor:
        # A new file every time: an old one's content would become the initial state.
        handle, path = tempfile.mkstemp(dir=self.directory, prefix=f"optimizer-state-{os.getpid()}-")
        try:
            _reserve(handle, num_bytes)
            return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8, device="cpu")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = format_bytes(shutil.disk_usage(self.directory).free)
            raise ConfigurationError(
                f"OptimizerOffload: no room for {format_bytes(num_bytes)} more of optimizer state in {self.directory} "
                f"({free} free there: {error.strerror}). Choose a directory on a larger disk."
            ) from error
        finally:
            os.unlink(path)
            os.close(handle)


def _reserve(handle: int, num_bytes: int) -> None:
    """Give a file its blocks: where a mapped page has no block to go to, the system kills the process."""
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        left = num_bytes
        while left:
            left -= os.write(handle, bytes(min(left, _ZEROS)))


_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
_MADV_DONTNEED = 4  # on Linux and macOS


_MADV_POPULATE_WRITE = 23  # Linux 5.14; older ones refuse it, and pages are mapped one by one


def _map_pages(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if _libc is not None and sys.platform == "linux":
        _libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _MADV_POPULATE_WRITE)


def _drop_pages(tensor: Tensor) -> None:
    """Take the pages of a tensor out of this process; the system writes them to their file when it likes."""
    storage = tensor.untyped_storage()  # begins at a page: one file, one mapping, one tensor
    if _libc is not None:
        _libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _MADV_DONTNEED)


def directory_problems(directory: str | Path) -> list[str]:
    """Return why a directory cannot hold state: nothing, or one sentence."""
    if os.name != "posix":
        return [
            "state in files needs Linux or macOS, whose mapped files may be removed while in use; use device='cpu'."
        ]
    path = Path(directory)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        return [f"device={str(directory)!r} asks for a directory, and {existing} is a file."]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"device={str(directory)!r} asks for a directory, and {existing} is not writable."]
    return []


def disk_free_bytes(directory: str | Path) -> int:
    """Return the free bytes of the disk a directory is on, or will be made on."""
    path = Path(directory)
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def is_in_memory(directory: str | Path) -> bool:
    """Return whether a directory's files are in memory themselves (tmpfs), so that nothing would be saved."""
    path = Path(directory).absolute()
    best, kind = "", ""
    for place, name in _mounts():
        if path.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, name
    return kind in ("tmpfs", "ramfs")


def _mounts() -> Iterator[tuple[str, str]]:
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, place, name, *_ = line.split()
        yield place.replace("\\040", " "), name
