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
from lightning_memsave.transforms._patch import patch_forward
from lightning_memsave.transforms._selection import linear_kind

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


def store_frozen(root: nn.Module, dtype: torch.dtype) -> tuple[list[Callable[[], None]], int]:
    """Store frozen matrices in ``dtype`` in place: weights and biases of linear layers and embeddings.

    A parameter is converted only where every module that holds it can compute with it; norms, convolutions and
    everything else keep their dtype. Ties stay ties.

    Returns:
        Functions that put the old dtype back (the values stay rounded), and the number of parameters converted.

    """
    holders: dict[int, list[nn.Module]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.requires_grad and parameter.dtype in _WIDE:
                holders.setdefault(id(parameter), []).append(module)
                parameters[id(parameter)] = parameter
    converted = {key for key, modules in holders.items() if all(_computes_wide(m) for m in modules)}
    undos: list[Callable[[], None]] = []
    for module in root.modules():
        weight = module._parameters.get("weight")
        if type(module) is nn.Embedding and id(weight) in converted and weight is not None:
            undos.append(patch_forward(module, forward_frozen_embedding, dtype=weight.dtype))
    for key in converted:
        undos.append(_narrow(parameters[key], dtype))
    return undos, len(converted)


_WIDE = (torch.float32, torch.float64)


def _computes_wide(module: nn.Module) -> bool:
    """Return whether the module's forward, here or from ``lean_frozen_layers``, casts a narrow weight itself."""
    if type(module) is nn.Embedding:
        return module.max_norm is None and "forward" not in module.__dict__
    return linear_kind(module) is not None


def _narrow(parameter: nn.Parameter, dtype: torch.dtype) -> Callable[[], None]:
    old = parameter.dtype
    parameter.data = parameter.data.to(dtype)

    def undo() -> None:
        parameter.data = parameter.data.to(old)

    return undo
