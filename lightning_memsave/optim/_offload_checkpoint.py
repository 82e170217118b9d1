"""Checkpoints of a run whose optimizer state does not fit into memory: read by mapping, written without a copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["is_local", "read_checkpoint", "write_checkpoint"]

_STATES = "optimizer_states"


def is_local(path: Any) -> bool:
    """Return whether a path is of a file on this machine, not of a remote store."""
    return "://" not in str(path)


def read_checkpoint(path: str | Path, *, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint whose optimizer states stay in the file until they are copied out of it.

    Everything else is in memory: others may keep it, and the file may be written again.
    """
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    return {
        key: value if key == _STATES else tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)
        for key, value in checkpoint.items()
    }


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint straight to disk; the file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
