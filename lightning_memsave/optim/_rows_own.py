"""The optimizers that are written here, or come with torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_memsave.optim._row import Group, OptimizerRow, with_tuples
from lightning_memsave.optim.state_bytes import adafactor_state_bytes

__all__ = ["ROWS"]


def _build_adafactor(groups: Sequence[Group], options: Mapping[str, Any], keep_32bit: Collection[int]) -> Optimizer:
    return torch.optim.Adafactor(groups, **with_tuples(options))


ROWS = (
    OptimizerRow(
        name="adafactor",
        title="Adafactor",
        family="adafactor",
        shared=("beta2_decay", "eps", "d", "foreach"),
        options=("beta2_decay", "d", "eps", "foreach", "weight_decay"),
        build=_build_adafactor,
        state_bytes=lambda p, _keeps, _options: adafactor_state_bytes(p),
        state="4 (rows + columns) / (rows * columns)",
        numerics="Adafactor: one second moment a row and a column, no first moment",
        source="Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235",
        library="torch",
        maximizes=True,
        rule_note=(
            "Adafactor scales each step by the size of the weights and wants a larger learning rate "
            "(1e-3 to 1e-2); it was kept"
        ),
    ),
)
