"""The step of an offloaded optimizer: its own rule, on host tensors, one bucket at a time."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.optim._offload_boundary import Boundary, Slot, room_for
from lightning_memsave.optim._offload_twin import SUBJECT, Position, Stepped, commit, step_on
from lightning_memsave.optim.disk_state import DiskState
from lightning_memsave.optim.local_shards import shard_of, standing_for
from lightning_memsave.units import MIB

__all__ = ["BUCKET_BYTES", "MASTER", "HostStep", "Installed", "cut", "needs_master", "slot_needs", "staged_sizes"]

BUCKET_BYTES = 32 * MIB  # of parameters that are stepped together; a larger one is a bucket of its own
MASTER = "master_weight"  # key of the fp32 weight in the state of a 16-bit parameter

_SLOTS = 3  # one bucket arrives, one is stepped, one leaves
_HALF = (torch.bfloat16, torch.float16)

T = TypeVar("T")
Entry = tuple[Position, Tensor]  # where a parameter stands in the optimizer, and the parameter
# Returns the gradient of a parameter if it is in host memory already.
HostGradient = Callable[[Tensor], "Tensor | None"]


def needs_master(p: Tensor) -> bool:
    """Return whether an fp32 master weight holds more than the parameter itself."""
    return p.dtype in _HALF


def staged_sizes(p: Tensor, gradient_bytes: int, *, master: bool) -> list[int]:
    """Return the bytes of what passes through staging memory for a parameter; with a master weight, in fp32 too."""
    return [p.nbytes, gradient_bytes, *([p.numel() * 4] if master else [])]


def cut(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Cut items into lists of at most so many bytes; a larger item is a list of its own."""
    bucket: list[T] = []
    size = 0
    for item in items:
        if bucket and size + size_of(item) > most:
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += size_of(item)
    if bucket:
        yield bucket


def slot_needs(sizes: Sequence[Sequence[int]]) -> list[int]:
    """Return the bytes of each staging slot for buckets of tensors of these sizes."""
    needs = [0] * _SLOTS
    for i, bucket in enumerate(sizes):
        needs[i % _SLOTS] = max(needs[i % _SLOTS], room_for(bucket))
    return needs


@dataclass
class _Staged:
    """One bucket whose values are on their way to the host."""

    entries: list[Entry]
    shadows: dict[Position, Tensor]  # the weights, each with its gradient
    half: dict[Position, tuple[Tensor, Tensor]]  # 16-bit weights and gradients of what has a master weight
    slot: Slot


class HostStep:
    """Steps the parameters of one optimizer on the host.

    Args:
        optimizer: Its state holds host tensors, keyed by the parameters as always.
        boundary: Between the parameters and the host; ``None`` steps the parameters where they are.
        disk: Keeps the state in files; ``None`` for host memory.
        master_weights: 16-bit parameters have an fp32 weight in their state.
        bucket_bytes: Parameters that are stepped together.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        boundary: Boundary | None,
        disk: DiskState | None = None,
        master_weights: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.optimizer = optimizer
        self.boundary = boundary
        self._disk = disk
        self._master_weights = master_weights
        self.bucket_bytes = bucket_bytes
        self._slots = [Slot(boundary) for _ in range(_SLOTS)] if boundary is not None else []
        self._turn = 0
        self._parts: list[Stepped] = []  # since the last commit
        self._versions: dict[int, int] = {}  # of parameters with a master weight, when they were written last

    @property
    def staging_bytes(self) -> int:
        """Host memory through which weights and gradients pass."""
        return sum(slot.nbytes for slot in self._slots)

    # -- buckets --------------------------------------------------------------------------------------------------
    def entries(self, has_gradient: Callable[[Tensor], bool]) -> list[Entry]:
        """Return the parameters of the optimizer's present groups that have a gradient, each once."""
        found: dict[int, Entry] = {}
        for i, group in enumerate(self.optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                if has_gradient(p):
                    found.setdefault(id(p), ((i, j), p))
        return list(found.values())

    def buckets(self, entries: Iterable[Entry]) -> Iterator[list[Entry]]:
        """Cut entries into buckets."""
        return cut(entries, lambda entry: entry[1].nbytes, self.bucket_bytes)

    # -- one step -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, entries: Iterable[Entry], host_gradient: HostGradient = lambda p: None) -> None:
        """Step parameters; the next bucket comes while one is stepped and the one before leaves."""
        if self.boundary is None:
            for bucket in self.buckets(entries):
                self._update(bucket, dict(bucket))
            return
        ahead: _Staged | None = None
        buckets = list(self.buckets(entries))
        sizes = [[size for _, p in bucket for size in self._sizes(p)] for bucket in buckets]
        for i, need in enumerate(slot_needs(sizes)):  # once, instead of growing
            self._slots[(self._turn + i) % _SLOTS].reserve(need)
        for bucket in buckets:
            staged = self._stage(bucket, host_gradient, self.boundary)
            if ahead is not None:
                self._finish(ahead, self.boundary)
            ahead = staged
        if ahead is not None:
            self._finish(ahead, self.boundary)

    def begin(self) -> None:
        """Begin a step; what one that failed left is forgotten."""
        self._parts.clear()
        self._turn = 0  # so that a bucket comes into the same memory in every step

    def commit(self) -> None:
        """End a step whose parts may have come in several calls of ``step``."""
        parts, self._parts = self._parts, []
        commit(self.optimizer, parts)
        if self._disk is not None:
            self._disk.trim()
        if self.boundary is not None:
            self.boundary.finish()

    def _stage(self, bucket: list[Entry], host_gradient: HostGradient, boundary: Boundary) -> _Staged:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % _SLOTS
        slot.open(size for _, p in bucket for size in self._sizes(p))
        staged = _Staged(bucket, {}, {}, slot)
        pairs = []
        for at, p in bucket:
            gradient = host_gradient(p)
            if gradient is None:
                pairs.append(self._staged_gradient(p, slot))
                gradient = pairs[-1][1]
            if self._has_master(p):
                staged.half[at] = (slot.like(p), gradient)
                if self._master(p) is None or self._versions.get(id(p)) != p._version:
                    pairs.append((p.detach(), staged.half[at][0]))
                shadow = slot.like(p, torch.float32)  # for the gradient: the weight itself stays in the state
            else:
                shadow = slot.like(p)
                pairs.append((p.detach(), shadow))
                shadow.grad = gradient
            staged.shadows[at] = shadow
        slot.ticket = boundary.download(pairs)
        return staged

    def _finish(self, staged: _Staged, boundary: Boundary) -> None:
        staged.slot.ticket.wait()
        for at, p in staged.entries:
            if at in staged.half:
                staged.shadows[at] = self._with_master(p, staged.shadows[at], *staged.half[at])
        self._update(staged.entries, staged.shadows)
        pairs = []
        for at, p in staged.entries:
            if at in staged.half:
                pairs.append((staged.half[at][0].copy_(staged.shadows[at]), p))
            else:
                pairs.append((staged.shadows[at], p))
            staged.shadows[at].grad = None
        staged.slot.ticket = boundary.upload(pairs)
        self._versions.update((id(p), p._version) for at, p in staged.entries if at in staged.half)

    def _update(self, bucket: list[Entry], shadows: Mapping[Position, Tensor]) -> None:
        held = self.optimizer.state
        states = {at: held[p] for at, p in bucket if p in held}
        if self._disk is not None:
            for state in states.values():
                self._disk.fetch(state)
        # out of sight: optimizers take a parameter without any state for a new one
        masters = {at: state.pop(MASTER) for at, state in states.items() if MASTER in state}
        fuse = self.boundary is not None and self.boundary.fuses
        try:
            with standing_for((shadows[at], p) for at, p in bucket):  # some know their parameters by identity
                stepped = step_on(self.optimizer, shadows, states, fuse=fuse)
            self._parts.append(stepped)
            states = stepped.states
        finally:
            for at, master in masters.items():
                states.setdefault(at, {})[MASTER] = master
        for at, p in bucket:
            if at in states:
                held[p] = self._kept(states[at])

    def _sizes(self, p: Tensor) -> list[int]:
        gradient = (
            0 if p.grad is None else p.grad.numel() * p.grad.element_size()
        )  # of a sparse one, before its refusal
        return staged_sizes(p, gradient, master=self._has_master(p))

    @staticmethod
    def _staged_gradient(p: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
        gradient = p.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise ConfigurationError(
                f"{SUBJECT}: a gradient of shape {tuple(p.shape)} is {gradient.layout}; only dense gradients are moved "
                "to the host. Write sparse=False in the embedding."
            )
        return gradient.detach(), slot.like(gradient)

    # -- master weights -------------------------------------------------------------------------------------------
    def _has_master(self, p: Tensor) -> bool:
        return self._master_weights and needs_master(p)

    def _master(self, p: Tensor) -> Tensor | None:
        return self.optimizer.state[p].get(MASTER) if p in self.optimizer.state else None

    def _with_master(self, p: Tensor, room: Tensor, half: Tensor, gradient: Tensor) -> Tensor:
        """Return the fp32 weight with its fp32 gradient; what others wrote into the parameter since is taken over."""
        master = self._master(p)
        if master is None:
            master = half.float()
            self.optimizer.state[p][MASTER] = master
        elif self._versions.get(id(p)) != p._version:
            master.copy_(torch.where(master.to(half.dtype) == half, master, half.float()))
        room.copy_(gradient)
        master.grad = room
        return master

    # -- where the state is ---------------------------------------------------------------------------------------
    def _kept(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self._disk is None else self._disk.keep(state)

    def settle(self) -> None:
        """Bring what state the optimizer has already to where it belongs, a parameter at a time."""
        for p in list(self.optimizer.state):
            if isinstance(p, Tensor):
                self.optimizer.state[p] = self._kept(_to_host(self.optimizer.state[p]))

    def load(self, state_dict: dict[str, Any], inner: Callable[[dict[str, Any]], None]) -> dict[Tensor, Any]:
        """Load a state dict into host memory, whatever the device of the parameters; return the state.

        torch moves what it loads to the device and the dtype of the parameters, so the optimizer's own
        ``load_state_dict`` is shown parameters on the host instead, of the same shapes and without memory.
        """
        optimizer = self.optimizer
        real = [group["params"] for group in optimizer.param_groups]
        shown = [[self._stand_in(p) for p in parameters] for parameters in real]
        before = optimizer.state
        _set_parameters(optimizer, shown)
        optimizer.state = defaultdict(dict)
        pairs = [(s, p) for ss, ps in zip(shown, real) for s, p in zip(ss, ps)]
        try:
            with standing_for(pairs):
                inner(state_dict)
            loaded: Any = optimizer.state
        finally:
            optimizer.state = before
            _set_parameters(optimizer, real)
        before.clear()
        self._versions.clear()
        return {p: self._kept(self._loaded(p, loaded.pop(s))) for s, p in pairs if s in loaded}

    def _loaded(self, p: Tensor, state: Any) -> Any:
        if isinstance(state, dict) and not self._has_master(p):
            state.pop(MASTER, None)  # written by a run with master weights
        return state

    def _stand_in(self, p: Tensor) -> Tensor:
        dtype = torch.float32 if self._has_master(p) else p.dtype
        return torch.empty((), dtype=dtype, device="cpu").expand(shard_of(p).shape)


def _set_parameters(optimizer: Optimizer, parameters: list[list[Tensor]]) -> None:
    for group, tensors in zip(optimizer.param_groups, parameters):
        group["params"] = tensors


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu")
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(item) for item in value)
    return value


_REPLACED = ("step", "load_state_dict")


class Installed:
    """Puts a host step in the place of an optimizer's ``step`` and ``load_state_dict``, on the instance.

    Args:
        host_step: What steps.
        around: Called with the closure and a function that steps everything that has a gradient then; the default
            runs the closure first.

    """

    def __init__(self, host_step: HostStep, around: Callable[..., Any] | None = None) -> None:
        self.host_step = host_step
        self._around = around
        self._held: dict[Tensor, Any] | None = None
        self._holding = False
        optimizer = host_step.optimizer
        self._before: dict[Any, Any] = {
            key: optimizer.__dict__[key] for key in ("step", "load_state_dict") if key in optimizer.__dict__
        }
        self._load_inner = optimizer.load_state_dict
        step: Any = Optimizer.profile_hook_step(self._step)
        step._wrapped_by_lr_sched = True  # what a scheduler looks for at its first step
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.load_state_dict = self._load  # type: ignore[method-assign]
        host_step.settle()

    def _step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        host_step = self.host_step
        if self._around is not None:
            return self._around(closure)
        loss = run_closure(closure)
        host_step.begin()
        host_step.step(host_step.entries(lambda p: p.grad is not None))
        host_step.commit()
        return loss

    def _load(self, state_dict: dict[str, Any]) -> None:
        loaded = self.host_step.load(state_dict, self._load_inner)
        if self._holding:
            self._held = loaded
        else:
            self.host_step.optimizer.state.update(loaded)

    def hold(self) -> None:
        """Keep what is loaded from now on out of ``optimizer.state``, where a caller would move it to the device."""
        self._holding = True

    def let_go(self) -> None:
        """Put what was loaded meanwhile into ``optimizer.state``."""
        self._holding = False
        if self._held is not None:
            self.host_step.optimizer.state.update(self._held)
            self._held = None

    def close(self) -> None:
        """Give the optimizer its methods back; its state stays where it is. A second call does nothing."""
        optimizer = self.host_step.optimizer
        for key in _REPLACED:
            optimizer.__dict__.pop(key, None)
        optimizer.__dict__.update(self._before)


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Evaluate the loss as torch's optimizers do."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
