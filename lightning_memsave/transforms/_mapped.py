"""Weights that lie in a memory-mapped file, as loaders of safetensors leave them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

__all__ = ["leave_mapped_files"]


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


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def _mapped(tensor: Tensor) -> bool:
    """Return whether the memory is not torch's own, which alone can be resized, and is not shared on purpose."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    storage = tensor.untyped_storage()
    return storage.nbytes() > 0 and not storage.resizable() and not storage.is_shared()
