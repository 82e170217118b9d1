"""Opt-in attach: ``LIGHTNING_MEMSAVE=qlora python train.py`` adds savers to a project whose code cannot be touched.

Lightning calls these functions at every Trainer (and Fabric) that is made in an environment where this package is
installed, so they must cost nothing and return nothing without the variable.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["callbacks_from_environment", "fabric_callbacks_from_environment"]

VARIABLE = "LIGHTNING_MEMSAVE"


def callbacks_from_environment() -> list[Any]:
    """Return the callbacks that ``LIGHTNING_MEMSAVE`` names, or ``[]`` without it."""
    if not os.environ.get(VARIABLE):
        return []
    raise NotImplementedError


def fabric_callbacks_from_environment() -> list[Any]:
    """Return the callbacks that ``LIGHTNING_MEMSAVE`` names for Fabric, or ``[]`` without it."""
    return callbacks_from_environment()
