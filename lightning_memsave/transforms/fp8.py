"""Exchange linear layers for torchao's fp8 ones, where the device has fp8 products."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["RECIPES", "capability_problem", "swap_linear_layers"]

# recipe -> the compute capability from which its products run
RECIPES: dict[str, tuple[int, int]] = {"rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0), "tensorwise": (8, 9)}
_MULTIPLE = 16  # of both sizes of a weight, for fp8 products


def capability_problem(device: torch.device, recipe: str) -> str | None:
    """Return why a device cannot multiply in fp8 and what to write instead, or ``None`` where it can."""
    instead = "Use Trainer(precision='bf16-mixed')."
    if device.type != "cuda":
        return f"fp8 products need a CUDA GPU of compute capability 8.9 or later, and the run is on {device}. {instead}"
    found, needed = torch.cuda.get_device_capability(device), RECIPES[recipe]
    if found >= needed:
        return None
    name = torch.cuda.get_device_name(device)
    if found >= RECIPES["tensorwise"]:
        instead = "Write FP8Precision('tensorwise'), which it has."
    return (
        f"recipe={recipe!r} needs compute capability {needed[0]}.{needed[1]}, and {name} has {found[0]}.{found[1]}. "
        f"{instead}"
    )


def swap_linear_layers(module: nn.Module, library: Any, recipe: str) -> tuple[list[str], list[str]]:
    """Convert the linear layers of a module in place; parameters stay the same objects under the same names.

    Args:
        module: Its plain ``nn.Linear`` layers are converted, subclasses are not (adapters, quantized layers).
        library: ``torchao.float8``.
        recipe: Name of one of its recipes.

    Returns:
        The names of the layers that multiply in fp8 now, and of those whose sizes or hooks do not allow it.

    """
    linear = {name: m for name, m in module.named_modules() if type(m) is nn.Linear}
    fits = {name for name, m in linear.items() if _fits(m)}
    modes = {name: linear[name].training for name in fits}
    config = library.Float8LinearConfig.from_recipe_name(recipe)
    if fits:
        library.convert_to_float8_training(module, config=config, module_filter_fn=lambda _, name: name in fits)
    for name, training in modes.items():
        module.get_submodule(name).train(training)
    before = {name for name, m in module.named_modules() if type(m).__name__ == "Float8Linear"}
    return sorted(fits | before), sorted(set(linear) - fits)


def _fits(linear: nn.Linear) -> bool:
    # the new layer has none of the hooks of the old one
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or "forward" in vars(linear)
    return not hooked and linear.in_features % _MULTIPLE == 0 and linear.out_features % _MULTIPLE == 0
