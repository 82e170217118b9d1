"""Where a step is: its phase and its module, in forward, recomputation, backward and optimizer steps."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from lightning_memsave.memory._inventory import parameter_owners
from lightning_memsave.memory.ledger import OPTIMIZER_MODULE, PHASES

__all__ = ["BACKWARD", "FORWARD", "OPTIMIZER", "VALIDATION", "Place", "graph_task"]

FORWARD, BACKWARD, OPTIMIZER, VALIDATION = range(len(PHASES))
_ACCUMULATE = 1 << 63  # gradient accumulators carry the largest sequence number

graph_task = torch._C._current_graph_task_id  # the autograd engine's run that the calling thread works for, or -1
_next_number = torch._C._autograd._get_sequence_nr


class Place:
    """Follow the phase and the module of one step.

    Autograd numbers its nodes as the forward makes them, so the numbers at which the forward entered and left a
    module tell whose node the backward is running; no hook on any tensor is needed.

    Args:
        module: The root of the names.

    """

    def __init__(self, module: nn.Module) -> None:
        self.names = {id(m): name for name, m in module.named_modules()}
        self.owners = parameter_owners(module)
        self.phase = FORWARD  # of code outside of modules, backward and optimizer steps
        self.pinned = False  # the phase holds whatever runs
        self.optimizer_steps = 0  # that we are inside of
        self._stack: list[str] = []
        self._base = 0  # depth of the stack when backward began
        self._numbers: list[int] = []
        self._modules: list[str] = []
        self._thread = threading.get_ident()

    @property
    def at_root(self) -> bool:
        """Whether no module runs."""
        return not self._stack

    def phase_now(self) -> int:
        """Return the phase, as an index into ``PHASES``."""
        if self.pinned:
            return self.phase
        if self.optimizer_steps:
            return OPTIMIZER
        return self.phase if graph_task() == -1 else BACKWARD

    def module_now(self, phase: int) -> str:
        """Return the qualified name of the module that memory made now belongs to."""
        if phase == OPTIMIZER:
            return OPTIMIZER_MODULE
        if phase == BACKWARD and len(self._stack) <= self._base:  # and no module is being recomputed
            return self._module_of(torch._C._current_autograd_node())
        return self._stack[-1] if self._stack else ""

    def accumulates(self) -> bool:
        """Return whether the engine is handing a gradient to its parameter (and to DDP's hooks there)."""
        node: Any = torch._C._current_autograd_node()
        return node is not None and bool(node._sequence_nr() >= _ACCUMULATE)

    def begin_backward(self) -> None:
        """Note that the engine starts."""
        self._base = len(self._stack)

    def enter(self, name: str) -> None:
        """Note that a module's forward begins."""
        self._stack.append(name)
        self._note()

    def leave(self, name: str) -> None:
        """Note that a module's forward ended, and with it what an exception skipped."""
        if name in self._stack:
            while self._stack.pop() != name:
                pass
            self._note()

    def _note(self) -> None:
        if threading.get_ident() == self._thread:  # numbers are counted per thread
            self._numbers.append(_next_number())
            self._modules.append(self._stack[-1] if self._stack else "")

    def _module_of(self, node: Any) -> str:
        if node is None:
            return ""
        number = node._sequence_nr()
        if number >= _ACCUMULATE:
            return self.owners.get(id(getattr(node, "variable", None)), "")
        position = bisect_right(self._numbers, number) - 1
        return self._modules[position] if position >= 0 else ""
