"""Store frozen weights in 16 bits, and run frozen layers without saving cast copies of their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lightning_memsave.transforms._frozen import (
    forward_frozen_conv1d,
    forward_frozen_embedding,
    forward_frozen_linear,
)
from lightning_memsave.transforms._mapped import MappedFiles, leave_mapped_files
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms._selection import kept_in_fp32, linear_kind

__all__ = ["lean_frozen_layers", "store_frozen"]


def lean_frozen_layers(root: nn.Module) -> list[Callable[[], None]]:
    """Give every frozen linear layer the forward that saves its weight as it is stored."""
    undos: list[Callable[[], None]] = []
    for module in root.modules():
        kind = linear_kind(module)
        if kind not in ("linear", "conv1d") or "forward" in module.__dict__:
            continue
        if not module.get_parameter("weight").requires_grad:
            undos.append(patch_forward(module, forward_frozen_linear if kind == "linear" else forward_frozen_conv1d))
    return undos


def store_frozen(root: nn.Module, dtype: torch.dtype) -> list[Callable[[], None]]:
    """Store frozen weights and biases of linear layers and embeddings in ``dtype``, in place.

    Call it after ``lean_frozen_layers``. A parameter is converted only where every module holding it casts it: norms,
    convolutions, what a transformers model keeps in fp32 and everything else keep their dtype. Ties stay ties.

    Returns:
        Functions that put the old dtype back; the values stay rounded.

    """
    kept = kept_in_fp32(root)
    parameters: dict[int, nn.Parameter] = {}
    refused: set[int] = set()
    for name, module in root.named_modules():
        casts = _casts_weights(module) and name.removesuffix(".base_layer") not in kept
        for parameter in module._parameters.values():
            if parameter is None or parameter.requires_grad or parameter.dtype not in _WIDE:
                continue
            parameters[id(parameter)] = parameter
            if not casts:
                refused.add(id(parameter))
    converted = parameters.keys() - refused
    undos: list[Callable[[], None]] = []
    for module in root.modules():
        weight = module._parameters.get("weight")
        if type(module) is nn.Embedding and id(weight) in converted and weight is not None:
            undos.append(patch_forward(module, forward_frozen_embedding, dtype=weight.dtype))
    files = MappedFiles()
    undos += [_narrow(parameters[key], dtype, files) for key in converted]
    if converted:
        leave_mapped_files(root)
    return undos


_WIDE = (torch.float32, torch.float64)


def _casts_weights(module: nn.Module) -> bool:
    """Return whether the module's forward casts a narrow weight itself."""
    forward = module.__dict__.get("forward")
    if type(module) is nn.Embedding:
        return module.max_norm is None and forward is None
    return linear_kind(module) is not None and isinstance(forward, InstanceForward)


def _narrow(parameter: nn.Parameter, dtype: torch.dtype, files: MappedFiles) -> Callable[[], None]:
    old = parameter.dtype
    wide = parameter.detach()
    parameter.data = wide.to(dtype)
    files.release(wide)
    del wide

    def undo() -> None:
        parameter.data = parameter.data.to(old)

    return undo
