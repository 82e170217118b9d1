"""What peft's LoRA layers compute, without wide copies of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memsave.transforms._frozen import autocast_dtype, forward_frozen_embedding
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms._selection import is_adapter

__all__ = ["adapter_parameters", "cast_weights_not_inputs", "kept_in_dtype", "lean_adapter"]


def lean_adapter(layer: nn.Module) -> list[Callable[[], None]]:
    """Let an adapted layer cast its thin weights to the input's dtype instead of the input to theirs.

    peft casts ``x`` to the adapter's fp32, and that copy lives until backward: ``4 * batch * tokens * in`` bytes a
    layer. Casting ``rank * (in + out)`` weights gives the same products as autocast does.

    DoRA keeps peft's way: it computes norms of weights in the dtype of ``x``, which need fp32.

    Returns:
        Functions that put things back.

    """
    undos: list[Callable[[], None]] = []
    if getattr(layer, "lora_magnitude_vector", None):
        return undos
    old = layer.__dict__.get("cast_input_dtype_enabled", True)
    layer.__dict__["cast_input_dtype_enabled"] = False
    undos.append(lambda: layer.__dict__.__setitem__("cast_input_dtype_enabled", old))
    for container in ("lora_A", "lora_B"):
        modules = getattr(layer, container, None)
        for module in modules.values() if isinstance(modules, nn.ModuleDict) else ():
            undos.append(cast_weights_not_inputs(module))
    return undos


def cast_weights_not_inputs(module: nn.Module) -> Callable[[], None]:
    """Patch a linear or convolution layer to compute in the dtype of its input (or of autocast)."""
    return patch_forward(module, _forward_cast)


def _forward_cast(patch: InstanceForward, x: Tensor) -> Tensor:
    module: Any = patch.module
    dtype = autocast_dtype(x) or x.dtype
    x, weight = x.to(dtype), module.weight.to(dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    out: Tensor = F.linear(x, weight, bias) if isinstance(module, nn.Linear) else module._conv_forward(x, weight, bias)
    return out


def adapter_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of all adapters, and those of trained layers that cast their weights themselves."""
    for module in root.modules():
        if is_adapter(module):
            for name in module.adapter_layer_names:  # type: ignore[union-attr]
                held = getattr(module, name, None)
                if isinstance(held, (nn.Module, nn.ParameterDict)):
                    yield from held.parameters()
        forward = module.__dict__.get("forward")
        if isinstance(forward, InstanceForward) and forward.call is _forward_cast:
            yield from module.parameters(recurse=False)


@contextmanager
def kept_in_dtype(root: nn.Module) -> Iterator[None]:
    """Keep dtype and values of all adapters while something inside casts the module (``precision="bf16-true"``).

    Narrow embeddings, which return rows in the model's dtype, follow the cast.
    """
    kept = {id(p): (p, p.data) for p in adapter_parameters(root)}
    # A probe tells a cast of the module from none, whoever casts.
    probe = "_memsave_dtype_probe"
    root.register_buffer(probe, torch.zeros((), dtype=torch.float32, device="cpu"), persistent=False)
    try:
        yield
    finally:
        dtype = root.get_buffer(probe).dtype
        delattr(root, probe)
        for parameter, data in kept.values():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        for module in root.modules() if dtype != torch.float32 else ():
            forward = module.__dict__.get("forward")
            if isinstance(forward, InstanceForward) and forward.call is forward_frozen_embedding:
                forward.options["dtype"] = dtype
