"""How categories look: names for people, colours that stay apart for colour-blind eyes, order of the stack."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_memsave.memory.ledger import (
    ACTIVATIONS,
    FROZEN_WEIGHTS,
    GRADIENTS,
    INPUTS,
    OPTIMIZER_STATE,
    OTHER,
    TEMPORARIES,
    WEIGHTS,
)

__all__ = ["COLORS", "LABELS", "PHASE_COLORS", "STACK", "group_modules", "module_label"]

# bottom to top: what stays for the whole run first, what comes and goes last
STACK = (WEIGHTS, FROZEN_WEIGHTS, OPTIMIZER_STATE, INPUTS, OTHER, GRADIENTS, ACTIVATIONS, TEMPORARIES)
COLORS = {
    WEIGHTS: "#3d6fb4",
    FROZEN_WEIGHTS: "#9dbfe6",
    OPTIMIZER_STATE: "#8a63b8",
    INPUTS: "#d9b83c",
    OTHER: "#9aa3ad",
    GRADIENTS: "#e5853a",
    ACTIVATIONS: "#35a37f",
    TEMPORARIES: "#d6506a",
}
LABELS = {
    WEIGHTS: "weights",
    FROZEN_WEIGHTS: "frozen weights",
    OPTIMIZER_STATE: "optimizer state",
    INPUTS: "inputs",
    OTHER: "other",
    GRADIENTS: "gradients",
    ACTIVATIONS: "activations",
    TEMPORARIES: "temporaries",
}
PHASE_COLORS = {"forward": "#5b8c5a", "backward": "#b4653a", "optimizer": "#6d5aa8", "validation": "#4a8fa8"}


def module_label(name: str) -> str:
    """Return a module's name for people; the root has none of its own."""
    return name or "(outside of submodules)"


def group_modules(modules: Mapping[str, Mapping[str, int]]) -> list[tuple[str, int, dict[str, int]]]:
    """Join repeated modules: ``blocks.0.up`` and ``blocks.1.up`` become ``blocks.*.up``.

    Returns:
        ``(pattern, number of modules, bytes by category)``, largest first.

    Example:
        >>> group_modules({"blocks.0": {"weights": 4}, "blocks.1": {"weights": 6}, "head": {"weights": 1}})
        [('blocks.*', 2, {'weights': 10}), ('head', 1, {'weights': 1})]

    """
    members: dict[str, list[str]] = {}
    for name in modules:
        members.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    rows = []
    for pattern, names in members.items():
        total: dict[str, int] = {}
        for name in names:
            for category, nbytes in modules[name].items():
                total[category] = total.get(category, 0) + nbytes
        rows.append((pattern if len(names) > 1 else names[0], len(names), total))
    return sorted(rows, key=lambda row: (-sum(row[2].values()), row[0]))
