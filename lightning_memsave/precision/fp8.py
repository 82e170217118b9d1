"""Multiply in fp8 while weights, gradients and optimizer stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from lightning_memsave._imports import require
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import ConfigurationError, NothingToTransformError, raise_problems
from lightning_memsave.planner.compatibility import check_methods
from lightning_memsave.precision._base import PrecisionPlugin, end_session
from lightning_memsave.transforms.fp8 import RECIPES, capability_problem, swap_linear_layers

__all__ = ["FP8Precision"]

_NAME = "FP8Precision"


class FP8Precision(PrecisionPlugin):
    """Multiply the matrices of linear layers in fp8, forward and backward.

    The linear layers become torchao's ``Float8Linear``, with the same parameters under the same names; everything else
    runs under bf16 autocast, as with ``precision="bf16-mixed"``. Compile the blocks
    (``for block in model.layers: block.compile()``), or the conversions to fp8 cost more than the products save.

    **Saves** time in large matrix products, and the bf16 copies of converted weights under autocast: 2 bytes a weight.
    Weights and optimizer state stay fp32.
    **Costs** the scaling and conversion of inputs, weights and gradients.
    **Numerics** are statistical: products of e4m3 values (3 bits) with one scale a row (``rowwise``) or a tensor.
    **Does not combine with** a GPU older than compute capability 8.9 (``rowwise``: 9.0), a CPU, FSDP1 and DeepSpeed.

    Args:
        recipe: ``rowwise``, ``rowwise_with_gw_hp`` (the product for the weight's gradient stays bf16) or
            ``tensorwise``.

    Raises:
        ConfigurationError: For an unknown recipe; at ``fit``, on a device that has no fp8 products.
        MissingDependencyError: At ``fit``, if torchao is not installed.
        NothingToTransformError: At ``fit``, if no linear layer has sizes that are multiples of 16.

    Example:
        >>> from lightning_memsave import FP8Precision
        >>> FP8Precision("tensorwise")
        FP8Precision(recipe='tensorwise')

    Source:
        torchao float8 training, https://docs.pytorch.org/ao/stable/workflows/training.html; Micikevicius et al. 2022,
        https://arxiv.org/abs/2209.05433.

    """

    precision: Any = "bf16-mixed"

    def __init__(self, recipe: Literal["rowwise", "rowwise_with_gw_hp", "tensorwise"] = "rowwise") -> None:
        if recipe not in RECIPES:
            raise_problems(_NAME, [f"recipe={recipe!r}. Write one of {', '.join(map(repr, RECIPES))}."])
        self.recipe = recipe
        self._module: Any = None
        self._device = "cuda"

    def convert_module(self, module: Any) -> Any:
        """Exchange the linear layers, on a GPU that can."""
        trainer = module.trainer
        session = Session.of(trainer)
        check_methods([*session.methods, _NAME], session.strategy_kind)
        problem = capability_problem(trainer.strategy.root_device, self.recipe)
        if problem:
            raise ConfigurationError(f"{_NAME}: {problem}")
        library = require("torchao.float8", _NAME)
        self._device = trainer.strategy.root_device.type
        swapped, skipped = swap_linear_layers(module, library, self.recipe)
        if not swapped:
            raise NothingToTransformError(
                f"{_NAME}: none of the {len(skipped)} linear layers can be multiplied in fp8: both sizes must be "
                "multiples of 16, and no hook may be on the layer. Found "
                f"{', '.join(skipped[:3]) or 'no linear layer'}. Use precision='bf16-mixed'."
            )
        self._module = module
        left = f"; {len(skipped)} left in bf16 ({', '.join(skipped[:3])})" if skipped else ""
        session.report(_NAME, f"{len(swapped)} linear layers multiply in fp8 ({self.recipe}){left}")
        return module

    def forward_context(self) -> AbstractContextManager[None]:
        """Run what is not converted in bf16."""
        return torch.autocast(self._device, dtype=torch.bfloat16)

    def teardown(self) -> None:
        """End the run; the converted layers stay."""
        if isinstance(self._module, nn.Module):
            end_session(self._module)
