"""Optimizer state on the host or on disk: what it needs there, whether that fits, and the optimizers that use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.memory.host import host_available_bytes
from lightning_memsave.optim import _offload_boundary
from lightning_memsave.optim._offload_boundary import Boundary
from lightning_memsave.optim._offload_gradients import HostGradients
from lightning_memsave.optim._offload_step import (
    BUCKET_BYTES,
    HostStep,
    Installed,
    cut,
    needs_master,
    slot_needs,
    staged_sizes,
)
from lightning_memsave.optim._offload_twin import SUBJECT, offload_problems
from lightning_memsave.optim.disk_state import DiskState, disk_free_bytes
from lightning_memsave.optim.state_bytes import predicted_state_bytes, trainable_parameters
from lightning_memsave.units import format_bytes

__all__ = ["HostNeed", "Offloaded", "boundary_of_parameters", "check_room", "host_need", "offload_optimizer"]


@dataclass(frozen=True, kw_only=True)
class HostNeed:
    """Bytes that one process needs outside of the device.

    Args:
        state: Moments once every parameter has stepped; ``None`` for an optimizer class whose state is not known.
        masters: fp32 weights of 16-bit parameters.
        gradients: Gradients that wait on the host.
        staging: What weights and gradients pass through.

    """

    state: int | None
    masters: int = 0
    gradients: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        """All of it, without what is not known."""
        return (self.state or 0) + self.masters + self.gradients + self.staging

    def parts(self) -> str:
        """Return the parts for people."""
        named = {
            "moments": self.state,
            "master weights": self.masters,
            "gradients": self.gradients,
            "staging": self.staging,
        }
        shown = [f"{name} {format_bytes(size)}" for name, size in named.items() if size]
        return ", ".join(shown + (["moments of unknown size"] if self.state is None else []))


def host_need(
    optimizers: Iterable[Optimizer], *, crosses: bool, gradients: bool = False, master_weights: bool = False
) -> HostNeed:
    """Return what optimizers will need outside of the device.

    Args:
        optimizers: Frozen parameters are not counted.
        crosses: Weights and gradients are copied between device and host.
        gradients: They stay on the host from backward to the step.
        master_weights: 16-bit parameters have an fp32 weight there.

    """
    optimizers = list(optimizers)
    parameters = [p for optimizer in optimizers for p in trainable_parameters(optimizer)]
    masters = sum(4 * p.numel() for p in parameters if master_weights and needs_master(p))
    states = [predicted_state_bytes(_as_stepped(optimizer, master_weights)) for optimizer in optimizers]
    staged = [
        [
            size
            for p in bucket
            for size in staged_sizes(p, 0 if gradients else p.nbytes, master=master_weights and needs_master(p))
        ]
        for optimizer in optimizers
        for bucket in cut(trainable_parameters(optimizer), lambda p: p.nbytes, BUCKET_BYTES)
    ]
    return HostNeed(
        state=None if any(state is None for state in states) else sum(state or 0 for state in states),
        masters=masters,
        gradients=sum(p.nbytes for p in parameters) if gradients else 0,
        staging=sum(slot_needs(staged)) if crosses else 0,
    )


def _as_stepped(optimizer: Optimizer, master_weights: bool) -> Optimizer:
    """Return a stand-in whose parameters have the dtype in which they are stepped."""
    stand_in = object.__new__(type(optimizer))
    stand_in.param_groups = [
        {**group, "params": [_stepped(p) if master_weights else p for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return stand_in


def _stepped(p: Tensor) -> Tensor:
    dtype = torch.float32 if needs_master(p) else p.dtype
    return torch.empty_like(p, dtype=dtype, device="meta").requires_grad_(p.requires_grad)


def check_room(need: HostNeed, *, directory: Path | None, num_local_ranks: int, host_budget: int | None) -> None:
    """Refuse a run that would fill the host's memory or the disk.

    Args:
        need: Of one process.
        directory: Where moments and master weights go; ``None`` for host memory.
        num_local_ranks: Processes on this machine that need as much.
        host_budget: Host memory that all of them may take together; ``None`` for what is available.

    Raises:
        ConfigurationError: If it does not fit.

    """
    stored = (need.state or 0) + need.masters
    in_memory = (need.total - stored if directory is not None else need.total) * num_local_ranks
    ranks = f" for {num_local_ranks} processes" if num_local_ranks > 1 else ""
    problems = []
    available = host_available_bytes()
    if host_budget is not None and in_memory > host_budget:
        problems.append(
            f"{format_bytes(in_memory)} of host memory is needed{ranks} ({need.parts()}), and host_budget allows "
            f"{format_bytes(host_budget)}. Raise it, or write device=<a directory>."
        )
    elif available is not None and in_memory > available:
        problems.append(
            f"{format_bytes(in_memory)} of host memory is needed{ranks} ({need.parts()}), and "
            f"{format_bytes(available)} is available. Write device=<a directory on a local disk>, or use an optimizer "
            "with smaller state (LowMemoryOptimizer)."
        )
    if directory is not None:
        free = disk_free_bytes(directory)
        if stored * num_local_ranks > free:
            problems.append(
                f"{format_bytes(stored * num_local_ranks)} of disk is needed{ranks} (optimizer state), and "
                f"{format_bytes(free)} is free in {directory}. Choose a directory on a larger disk."
            )
    raise_problems(SUBJECT, problems)


def boundary_of_parameters(optimizers: Sequence[Optimizer], *, master_weights: bool = False) -> Boundary | None:
    """Return the boundary between the parameters of optimizers and the host; ``None`` where there is none.

    Args:
        optimizers: All parameters of all groups are looked at.
        master_weights: 16-bit parameters on the host are apart from what is stepped, too.

    Raises:
        ConfigurationError: If they are on several devices, or sharded.

    """
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ConfigurationError(
            f"{SUBJECT}: the parameters of the optimizer are on {', '.join(sorted(map(str, devices)))}; it works with "
            "one device a process."
        )
    boundary = _offload_boundary.boundary_of(devices.pop()) if devices else None
    if boundary is None and master_weights and any(p.requires_grad and needs_master(p) for p in parameters):
        return Boundary()
    return boundary


class Offloaded:
    """One optimizer whose state lives on the host or on disk; see ``offload_optimizer``."""

    def __init__(self, host_step: HostStep, gradients: HostGradients | None) -> None:
        self.host_step = host_step
        self.gradients = gradients
        self._installed = Installed(host_step, gradients.step if gradients is not None else None)

    def hold(self) -> None:
        """Keep what ``load_state_dict`` reads from now on away from callers that would move it to the device."""
        self._installed.hold()

    def let_go(self) -> None:
        """Give the optimizer what was loaded meanwhile."""
        self._installed.let_go()

    def close(self) -> None:
        """Give the optimizer its methods back; its state stays where it is. A second call does nothing."""
        self._installed.close()
        if self.gradients is not None:
            self.gradients.close()


def offload_optimizer(
    optimizer: Optimizer,
    *,
    boundary: Boundary | None,
    disk: DiskState | None = None,
    master_weights: bool = False,
    gradients: bool = False,
    register: Any = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Offloaded:
    """Keep the state of an optimizer on the host or on disk, and step it there with its own rule.

    The optimizer stays the object it is: param groups, schedulers, hooks and checkpoints work as before, and its
    state has the parameters as keys and host tensors as values.

    Args:
        optimizer: Any optimizer with state per parameter.
        boundary: Between its parameters and the host; ``None`` where they are on the host already.
        disk: Where state goes; ``None`` for host memory.
        master_weights: Step 16-bit parameters in fp32 and keep the fp32 weight in the state.
        gradients: Move gradients to the host in backward.
        register: How ``gradients`` learns of a complete gradient; see ``HostGradients``.
        bucket_bytes: Parameters that are stepped together.

    Returns:
        A handle; ``close`` it in the end.

    Raises:
        ConfigurationError: If the optimizer cannot be stepped in parts, or its parameters are sharded.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> offloaded = offload_optimizer(optimizer, boundary=Boundary())
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['exp_avg', 'exp_avg_sq', 'step']
        >>> offloaded.close()

    """
    problems = offload_problems(optimizer)
    if any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
        problems.append(
            "the parameters are sharded (DTensor). Let FSDP2 keep shards, gradients and state on the host: "
            "fully_shard(..., offload_policy=CPUOffloadPolicy())."
        )
    raise_problems(SUBJECT, problems)
    host_step = HostStep(
        optimizer, boundary=boundary, disk=disk, master_weights=master_weights, bucket_bytes=bucket_bytes
    )
    host_gradients = None
    if gradients and boundary is not None:
        host_gradients = HostGradients(host_step, boundary, register)
    return Offloaded(host_step, host_gradients)
