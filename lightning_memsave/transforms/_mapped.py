"""Weights that lie in a memory-mapped file, as loaders of safetensors leave them."""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["MappedFiles", "leave_mapped_files"]

_SMAPS = Path("/proc/self/smaps")
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", 4)


@torch.no_grad()
def leave_mapped_files(root: nn.Module) -> int:
    """Copy what still lies in mapped files into memory of its own, in place, and return the bytes that were copied.

    All tensors of a file share one mapping, whose pages stay resident once they were read, until the last tensor is
    gone: one norm that keeps its weight would keep the bytes of the whole model. Call it when most weights were
    converted to something else.

    Args:
        root: Parameters and buffers stay the same objects where they are parameters; names do not change.

    """
    copied = 0
    parameters = list(root.parameters())
    holders = Counter(_storage(p) for p in parameters)
    for parameter in parameters:
        if holders[_storage(parameter)] == 1 and _mapped(parameter):
            parameter.data = parameter.data.clone()
            copied += parameter.nbytes
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _mapped(buffer):
                module._buffers[name] = buffer.clone()
                copied += buffer.nbytes
    return copied


class MappedFiles:
    """Gives the pages of mapped files back while their tensors are converted one after the other.

    Only pages that nobody wrote on are given back: whoever reads them again reads the same values from the file.
    """

    def __init__(self) -> None:
        self._clean = _clean_regions() if _SMAPS.exists() else []

    def release(self, tensor: Tensor) -> None:
        """Give back the pages that hold nothing but this tensor, whose values are not needed any more."""
        if not self._clean or not _mapped(tensor):
            return
        storage = tensor.untyped_storage()
        page = mmap.PAGESIZE
        start = -(-storage.data_ptr() // page) * page
        end = (storage.data_ptr() + storage.nbytes()) // page * page
        if start < end and any(low <= start and end <= high for low, high in self._clean):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def _clean_regions() -> list[tuple[int, int]]:
    """Return the address ranges of privately mapped files of which this process has changed no page."""
    regions: list[tuple[int, int]] = []
    region: tuple[int, int] | None = None
    for line in _SMAPS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            low, _, high = words[0].partition("-")
            mapped = len(words) > 5 and words[5].startswith("/") and words[1].endswith("p")
            region = (int(low, 16), int(high, 16)) if mapped else None
        elif words[0] == "Anonymous:" and region is not None and words[1] == "0":
            regions.append(region)
    return regions


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def _mapped(tensor: Tensor) -> bool:
    """Return whether the memory is not torch's own, which alone can be resized, and is not shared on purpose."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    storage = tensor.untyped_storage()
    return storage.nbytes() > 0 and not storage.resizable() and not storage.is_shared()
