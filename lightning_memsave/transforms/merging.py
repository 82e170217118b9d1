"""Merge adapters into the weights they lie on, on any module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_memsave._imports import require
from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms._adapter_config import adapted_layers
from lightning_memsave.transforms._bnb_layers import dequantized_weight
from lightning_memsave.transforms._frozen import forward_frozen_conv1d, forward_frozen_linear
from lightning_memsave.transforms._pass import applied_record
from lightning_memsave.transforms._patch import InstanceForward
from lightning_memsave.transforms._selection import linear_kind

__all__ = ["MergeReport", "merge_adapters"]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What ``merge_adapters`` did.

    Args:
        num_layers: Layers whose adapter went into their weight.
        num_dequantized: Layers among them whose weight was quantized and is floating now.
        untied: Layers whose weight was shared with another module and is their own now.

    """

    num_layers: int
    num_dequantized: int = 0
    untied: tuple[str, ...] = ()


@torch.no_grad()
def merge_adapters(module: nn.Module, *, dtype: torch.dtype | None = None) -> MergeReport:
    """Add every LoRA adapter to the weight it lies on and take it out, in place.

    The names are again those of the model without adapters. A quantized weight is dequantized first, to
    the values it stood for in training; quantizing the sum again would round the adapter away.

    **Saves** the adapters' bytes; a dequantized 4-bit weight grows 4 times in 16 bits, 8 times in 32.
    **Numerics** bounded: one rounding of each weight to its dtype, and products in another order.

    Args:
        module: Any module with peft's LoRA layers (with rank-stabilized or weight-decomposed ones too).
        dtype: Of the merged weights; ``None`` keeps the stored one (what it was quantized from; fp32 for int8).

    Returns:
        What was merged.

    Raises:
        ConfigurationError: If weights are sharded or not in memory.
        NothingToTransformError: If the module has no adapters.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_memsave import LoRA, apply, merge_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> _ = apply(model, [LoRA(rank=2, modules="Linear")])
        >>> merge_adapters(model)
        MergeReport(num_layers=2, num_dequantized=0, untied=())
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']

    """
    layers: dict[str, Any] = {entry.name: module.get_submodule(entry.name) for entry in adapted_layers(module)}
    if not layers:
        raise NothingToTransformError(
            f"merge_adapters: {type(module).__name__} has no LoRA adapters. Add them and load their weights first: "
            "apply(module, [LoRA(...)]), then load_adapters(module, path)."
        )
    _check_in_memory(module)
    peft_linear: type = require("peft.tuners.lora", "merge_adapters").Linear
    untied, num_dequantized = [], 0
    for name, layer in layers.items():
        if _untie(module, layer):
            untied.append(name)
        num_dequantized += _make_plain(layer, peft_linear, dtype)
        layer.merge(safe_merge=True)
        _take_frozen_forward(layer.base_layer)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.base_layer)
    _forget_adapters(module)
    return MergeReport(num_layers=len(layers), num_dequantized=num_dequantized, untied=tuple(untied))


def _forget_adapters(module: nn.Module) -> None:
    """Take the adapters off the list of what the module carries, so that new ones may be added."""
    record = applied_record(module)
    record[:] = [entry for entry in record if not entry["name"].startswith(("LoRA", "QLoRA"))]


def _check_in_memory(module: nn.Module) -> None:
    away = [n for n, p in module.named_parameters() if isinstance(p, DTensor) or p.device.type == "meta"]
    if away:
        raise ConfigurationError(
            f"merge_adapters: {away[0]} is sharded or on the meta device, and merging needs whole weights. Load the "
            "checkpoint into the module in one process (load_adapters) and merge there."
        )


def _take_frozen_forward(base: nn.Module) -> None:
    """Give a linear layer its own ``forward`` again, which fits a weight that may train.

    A weight stored narrower than 32 bits keeps the other one, which casts it to the dtype of the input.
    """
    forward = base.__dict__.get("forward")
    if base.get_parameter("weight").element_size() < 4:
        return
    if isinstance(forward, InstanceForward) and forward.call in (forward_frozen_linear, forward_frozen_conv1d):
        del base.__dict__["forward"]


def _make_plain(layer: Any, peft_linear: type, dtype: torch.dtype | None) -> bool:
    """Give a layer with a quantized weight a floating one, and peft's class for that; return whether it was."""
    base = layer.base_layer
    if linear_kind(base) not in ("4bit", "8bit"):
        if dtype is not None:
            for parameter in base.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
        return False
    state = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    weight = dequantized_weight(base, dtype or (torch.float32 if state is None else state.dtype))
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = base.bias
    if plain.bias is not None:
        plain.bias.data = plain.bias.data.to(weight.dtype)
    layer.base_layer = plain
    layer.fan_in_fan_out = False
    layer.__class__ = peft_linear
    return True


def _untie(module: nn.Module, layer: Any) -> bool:
    """Give a layer its own weight where another module shares it, which must not change with it."""
    base = layer.base_layer
    weight = base.weight
    holders = [m for m in module.modules() if m is not base and any(p is weight for p in m._parameters.values())]
    if not holders:
        return False
    base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return True
