"""Opt-in attach: ``LIGHTNING_MEMSAVE=qlora python train.py`` adds savers to a project whose code cannot be touched.

Lightning calls these functions for every Trainer (and Fabric) that is made where this package is installed, so
without the variable they cost nothing, import nothing and return nothing.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["VARIABLE", "callbacks_from_environment", "fabric_callbacks_from_environment"]

VARIABLE = "LIGHTNING_MEMSAVE"


def callbacks_from_environment() -> list[Any]:
    """Return the callbacks that ``LIGHTNING_MEMSAVE`` names, or ``[]`` without it."""
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return []
    from lightning_memsave.callbacks._environment import trainer_callbacks

    return trainer_callbacks(value)


def fabric_callbacks_from_environment() -> list[Any]:
    """Return the callback that attaches ``LIGHTNING_MEMSAVE``'s methods to a Fabric, or ``[]`` without it."""
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return []
    from lightning_memsave.callbacks._environment import fabric_callbacks

    return fabric_callbacks(value)
