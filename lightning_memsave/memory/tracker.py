"""Follow every storage of a training step: category, module and the true peak, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory._inventory import Held, gradients_of, module_state, state_of
from lightning_memsave.memory._place import BACKWARD, FORWARD, OPTIMIZER, VALIDATION, Place, graph_task
from lightning_memsave.memory._reach import is_wrapper, storages, tensors_in
from lightning_memsave.memory._resizes import resizes_seen_by
from lightning_memsave.memory.ledger import (
    COMMUNICATION,
    FROZEN_WEIGHTS,
    INPUTS,
    OTHER,
    PHASES,
    WEIGHTS,
    Block,
    Log,
    Measurement,
    measure,
)

__all__ = ["MemoryTracker", "track_memory"]

_LIFT = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default})


class _Reference(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage that knows which block ends with it."""

    __slots__ = ("key",)

    key: int


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow the storages of one step; see ``track_memory``.

    Enter it, run one step, leave it, then read ``measurement()``. Everything it installs is process-wide (module
    hooks, optimizer hooks) or on parameters (gradient hooks) and is gone when it is left; no name and no class of
    the model changes, so the model may be deep-copied meanwhile.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer] = (), inputs: Any = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = Log()
        self._module = module
        self._optimizers = tuple(optimizers)
        self._inputs = inputs
        self._blocks: dict[int, Block] = {}
        self._installed = ExitStack()
        self._place = Place(module)
        self._last_phase = FORWARD
        self._task = -1  # the autograd engine's run
        self._recomputing = False
        self._used = False
        self._distributed = dist.is_available() and dist.is_initialized()

    # -- life -----------------------------------------------------------------------------------------------------
    def __enter__(self) -> MemoryTracker:
        """Count what exists, install the hooks and start."""
        if self._used:
            raise ConfigurationError("MemoryTracker: one tracker follows one step; make a new one for the next step.")
        self._used = True
        self._place = Place(self._module)  # as the model is now, in the thread that runs it
        try:
            self._claim_all(module_state(self._module, self._optimizers))
            self._claim_gradients(self._module.parameters())
            for optimizer in self._optimizers:
                self._claim_state(optimizer)
            self.add_inputs(self._inputs)
            self._inputs = None
            self._install()
            super().__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop and take every hook away."""
        try:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
            self._claim_gradients(self._module.parameters())
            for optimizer in self._optimizers:
                self._claim_state(optimizer)
            self.log.marks.append(len(self.log.events))
        finally:
            self._release()

    def _release(self) -> None:
        self._installed.close()
        for block in self._blocks.values():
            block.reference = None
        self._blocks = {}

    def _install(self) -> None:
        keep = self._installed
        keep.callback(nn_module.register_module_forward_pre_hook(self._enter_module).remove)
        keep.callback(nn_module.register_module_forward_hook(self._leave_module, always_call=True).remove)
        keep.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        keep.callback(register_optimizer_step_post_hook(self._after_step).remove)
        keep.enter_context(resizes_seen_by(self._resized))
        for parameter in self._module.parameters():
            if parameter.requires_grad and parameter.is_leaf and id(parameter) in self._place.owners:
                handle = parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
                keep.callback(handle.remove)

    # -- what the driver says -------------------------------------------------------------------------------------
    def set_phase(self, phase: str) -> None:
        """Say what the code outside of modules, backward and optimizer steps belongs to from now on.

        Args:
            phase: ``forward``, ``optimizer``, or ``validation``, which holds until the next call whatever runs.

        """
        place = self._place
        place.phase = self._last_phase = PHASES.index(phase)
        place.pinned = place.phase == VALIDATION
        place.optimizer_steps = 0

    def add_inputs(self, batch: Any) -> None:
        """Count the tensors of a batch as inputs; any structure or object that holds tensors."""
        for tensor in tensors_in(batch):
            self._claim(tensor, INPUTS, "")

    def measurement(self, device: str | None = None) -> Measurement:
        """Return the memory of the step that was followed.

        Args:
            device: Device type to count; ``None`` is the accelerator if the step used one.

        """
        return measure(self.log, device)

    # -- memory that exists, and memory that gets its name ------------------------------------------------------------
    def _claim(self, tensor: Tensor, category: str, module: str, *, first: bool = False) -> None:
        """Give a tensor's storages their category; weights keep theirs.

        Args:
            tensor: The tensor.
            category: The category.
            module: Qualified name of the module it belongs to.
            first: Only if no other claim came before.

        """
        for storage, plain in storages(tensor):
            block = self._blocks.get(storage._cdata)
            if block is None:
                nbytes = storage.nbytes()
                if nbytes:
                    block = Block(nbytes, plain.device.type, module, category)
                    self._watch(storage, block)
                    self.log.initial.append((block, nbytes))
            elif not (first and block.category) and block.category not in (WEIGHTS, FROZEN_WEIGHTS):
                block.category, block.module = category, module

    def _claim_all(self, held: Iterable[Held]) -> None:
        for tensor, category, module in held:
            self._claim(tensor, category, module, first=category == OTHER)

    def _claim_gradients(self, parameters: Iterable[Tensor]) -> None:
        self._claim_all(gradients_of(parameters, self._place.owners))

    def _claim_state(self, optimizer: Optimizer) -> None:
        self._claim_all(state_of(optimizer, self._place.owners))

    # -- births and deaths ------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and see which storages it made."""
        for cls in types:
            if is_wrapper(cls):  # let it become operations on its inner tensors: those are seen here
                return NotImplemented
        task = graph_task()
        if task != self._task:
            self._switch(task)
        elif task != -1 and self._recomputing and not torch.is_grad_enabled():
            self._recomputing = False
            self.log.marks.append(len(self.log.events))
        out = func(*args, **kwargs) if kwargs else func(*args)
        if func.is_view and func not in _LIFT:
            return out
        if func not in _LIFT:
            self._observe(args, self._found)
            if kwargs:
                self._observe(kwargs.values(), self._found)
        if self._distributed and task != -1 and func._schema.is_mutable:
            self._see_communication(kwargs.get("out") if kwargs else None, args)
        if isinstance(out, Tensor):
            self._observe((out,), self._born)
        elif out is not None:
            self._observe(out, self._born)
        return out

    def _observe(self, values: Any, unknown: Callable[[torch.UntypedStorage, Tensor], None]) -> None:
        if not isinstance(values, (list, tuple)):
            values = tuple(values) if hasattr(values, "__iter__") else ()
        blocks = self._blocks
        for value in values:
            if isinstance(value, Tensor):
                for storage, plain in storages(value):
                    block = blocks.get(storage._cdata)
                    if block is None:
                        unknown(storage, plain)
                    elif block.nbytes != storage.nbytes():
                        self._resized(storage)
            elif isinstance(value, (list, tuple)):
                self._observe(value, unknown)

    def _born(self, storage: torch.UntypedStorage, tensor: Tensor | None) -> None:
        nbytes = storage.nbytes()
        if not nbytes:
            return
        device = (storage if tensor is None else tensor).device.type
        phase = self._place.phase_now()
        if phase == BACKWARD:
            candidate = self._recomputing = torch.is_grad_enabled()
        else:
            candidate = phase == FORWARD
        events = self.log.events
        block = Block(nbytes, device, self._place.module_now(phase), None, candidate=candidate, born=len(events))
        self._watch(storage, block)
        self._last_phase = phase
        events.append((block, nbytes, phase))

    def _found(self, storage: torch.UntypedStorage, tensor: Tensor) -> None:
        """Count a storage that no operation made (a constant, a communication buffer) from its first use on."""
        if tensor.dim():  # zero-dimensional ones are Python numbers on their way into an operation
            self._born(storage, tensor)
            block = self._blocks.get(storage._cdata)
            if block is not None:
                block.category = OTHER

    def _see_communication(self, out: Any, args: Any) -> None:
        """Recognise DDP's buckets: gradient accumulators write into them, and no operation of the step made them.

        They live from the first step on (rebuilt in the forward of the second), whenever they are seen first.
        """
        target = out if isinstance(out, Tensor) else args[0] if args and isinstance(args[0], Tensor) else None
        if target is None or not self._place.accumulates():
            return
        for storage, _ in storages(target):
            block = self._blocks.get(storage._cdata)
            if block is not None and block.category in (None, OTHER) and (block.candidate or block.category):
                if block.category == OTHER:
                    self.log.predate(block)
                block.category, block.module = OTHER, COMMUNICATION

    def _watch(self, storage: torch.UntypedStorage, block: Block) -> None:
        reference = _Reference(storage, self._died)
        reference.key = storage._cdata
        block.reference = reference
        self._blocks[reference.key] = block

    def _died(self, reference: _Reference) -> None:
        block = self._blocks.get(reference.key)
        if block is None or block.reference is not reference:
            return
        del self._blocks[reference.key]
        block.died, block.reference = len(self.log.events), None
        self.log.events.append((block, -block.nbytes, self._last_phase))  # a free belongs to what ran before it

    def _resized(self, storage: torch.UntypedStorage) -> None:
        block = self._blocks.get(storage._cdata)
        if block is None:
            self._born(storage, None)
            return
        change = storage.nbytes() - block.nbytes
        if change:
            block.nbytes += change
            self.log.events.append((block, change, self._place.phase_now()))

    # -- where we are -----------------------------------------------------------------------------------------------
    def _switch(self, task: int) -> None:
        """Note that the autograd engine started or ended a run."""
        if task != -1:
            self.log.marks.append(len(self.log.events))
            if self._task == -1:  # not a backward within a backward, as reentrant checkpointing runs them
                self.log.starts.append(len(self.log.events))
            self._place.begin_backward()
        else:
            self._claim_gradients(self._module.parameters())
        self._recomputing = False
        self._task = task

    # -- hooks --------------------------------------------------------------------------------------------------------
    def _enter_module(self, module: nn.Module, args: Any) -> None:
        place = self._place
        name = place.names.get(id(module))
        if name is None:
            return
        if not place.pinned and graph_task() == -1:
            place.phase, place.optimizer_steps = FORWARD, 0
            if place.at_root:
                for tensor in tensors_in(args):
                    if all(storage._cdata not in self._blocks for storage, _ in storages(tensor)):
                        self._claim(tensor, INPUTS, "")
        place.enter(name)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._place.names.get(id(module))
        if name is None:
            return
        for parameter in module._parameters.values():  # new ones (lazy, unsharded) and new storages (streamed)
            if parameter is not None and not isinstance(parameter, UninitializedParameter):
                self._place.owners.setdefault(id(parameter), name)
                self._claim(parameter, WEIGHTS if parameter.requires_grad else FROZEN_WEIGHTS, name)
        self._place.leave(name)

    def _accumulated(self, parameter: Tensor) -> None:
        self._claim_gradients((parameter,))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._claim_gradients(p for group in optimizer.param_groups for p in group["params"])
        place = self._place
        if place.pinned:
            return None
        place.optimizer_steps += 1
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def closed() -> Any:  # forward and backward run inside of step: they are not the optimizer's
            steps, place.optimizer_steps, place.phase = place.optimizer_steps, 0, FORWARD
            try:
                return closure()
            finally:
                place.optimizer_steps = steps

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closed}
        return (args[0], closed, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._claim_state(optimizer)
        if not self._place.pinned:
            self._place.optimizer_steps = max(0, self._place.optimizer_steps - 1)
            self._place.phase = OPTIMIZER  # what follows tidies up, until the next forward


def track_memory(module: nn.Module, *, optimizers: Iterable[Optimizer] = (), inputs: Any = None) -> MemoryTracker:
    """Follow the memory of one training step, in any loop.

    Bytes are counted exactly on CPU, CUDA, meta and fake tensors, by storage, at the moment of the true peak. What
    kernels allocate inside of one operation (workspaces) is not seen. Code under ``torch.compile`` runs uncompiled
    meanwhile.

    Args:
        module: The model; names in the measurement are its modules' qualified names.
        optimizers: Their state is counted; optimizers that step meanwhile are found by themselves.
        inputs: The batch. Tensors handed to ``module`` itself are found by themselves.

    Returns:
        A context manager; after it is left, ``measurement()`` holds the result.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> batch = torch.ones(8, 4)
        >>> with track_memory(model, inputs=batch) as tracker:
        ...     model(batch).sum().backward()
        >>> found = tracker.measurement().by_category
        >>> found["weights"], found["inputs"]
        (40, 128)

    """
    return MemoryTracker(module, optimizers, inputs)
