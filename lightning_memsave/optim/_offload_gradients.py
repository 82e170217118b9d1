"""Gradients that leave the device in backward, one parameter at a time, and the step that follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.optim._offload_boundary import Boundary, Slot, Ticket, view_like
from lightning_memsave.optim._offload_step import Entry, HostStep, run_closure
from lightning_memsave.optim._offload_twin import SUBJECT

__all__ = ["HostGradients"]

_SLOTS = 2


class Handle(Protocol):
    """What registering a hook returns."""

    def remove(self) -> None:
        """Take the hook away."""


class HostGradients:
    """Holds the gradients of one optimizer in host memory and runs its step.

    Gradients of later micro-batches are added on the host, in the order and the precision of the device.

    Args:
        host_step: Steps the parameters.
        boundary: Between the parameters and the host.
        register: Registers a function to be called with each parameter whose gradient is complete; by default a hook
            of every parameter.

    """

    def __init__(
        self,
        host_step: HostStep,
        boundary: Boundary,
        register: Callable[[Callable[[Tensor], None]], Handle] | None = None,
    ) -> None:
        self._host_step = host_step
        self._boundary = boundary
        # Steps a bucket in backward, while the next gradients come. Only where nothing changes or reads gradients
        # between backward and the step: no clipping, no hooks of the user.
        self.step_in_backward = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="memsave-offload")
        self._jobs: list[Future[None]] = []
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # parameter, gradient on the host
        self._tickets: dict[int, Ticket] = {}  # of the parameters whose gradient is here
        self._landing = [(Slot(boundary), _done()) for _ in range(_SLOTS)]
        self._positions: dict[int, Entry] | None = None  # while a backward is followed by a step
        self._bucket: list[Entry] = []
        self._stepped: set[int] = set()
        self._handles: dict[int, Handle] = {}
        self._all_at_once = register is not None
        if register is not None:
            self._handles[0] = register(self._arrive)
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Host memory for gradients, and for those that are added to them."""
        return sum(buffer.nbytes for _, buffer in self._buffers.values()) + sum(s.nbytes for s, _ in self._landing)

    def refresh(self) -> None:
        """Hook parameters that train by now; a parameter that is not hooked keeps its gradient on the device."""
        if self._all_at_once:
            return
        for group in self._host_step.optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and id(p) not in self._handles:
                    self._handles[id(p)] = p.register_post_accumulate_grad_hook(self._arrive)

    # -- arriving -------------------------------------------------------------------------------------------------
    def _arrive(self, p: Tensor) -> None:
        gradient = p.grad
        if gradient is None or gradient.layout != torch.strided:
            return
        if id(p) in self._stepped:
            raise ConfigurationError(
                f"{SUBJECT}: a parameter of shape {tuple(p.shape)} got a gradient again after it was stepped in the "
                "same backward (reentrant checkpointing of shared layers, or several backward calls). "
                "Write gradients=False."
            )
        if id(p) not in self._buffers:
            self._buffers[id(p)] = (p, view_like(self._boundary.buffer(gradient.nbytes), gradient))
        buffer = self._buffers[id(p)][1]
        if id(p) in self._tickets:
            self._add(gradient.detach(), buffer)
        else:
            self._tickets[id(p)] = self._boundary.download([(gradient.detach(), buffer)])
        p.grad = None
        if self._positions is not None and id(p) in self._positions:
            self._stepped.add(id(p))
            self._bucket.append(self._positions[id(p)])
            if sum(entry[1].nbytes for entry in self._bucket) >= self._host_step.bucket_bytes:
                self._submit_bucket()

    def _add(self, gradient: Tensor, buffer: Tensor) -> None:
        slot, job = self._landing.pop(0)
        job.result()
        slot.open([gradient.nbytes])
        landed = slot.like(gradient)
        slot.ticket = self._boundary.download([(gradient, landed)])

        def add() -> None:
            slot.ticket.wait()
            with torch.no_grad():
                buffer.add_(landed)

        job = self._worker.submit(add)
        self._jobs.append(job)
        self._landing.append((slot, job))

    def _submit_bucket(self) -> None:
        bucket, self._bucket = self._bucket, []
        self._jobs.append(self._worker.submit(self._host_step.step, bucket, self._gradient))

    def _gradient(self, p: Tensor) -> Tensor | None:
        ticket = self._tickets.get(id(p))
        if ticket is None:
            return None
        ticket.wait()
        return self._buffers[id(p)][1]

    def _wait(self) -> None:
        while self._jobs:
            self._jobs.pop(0).result()

    # -- using ----------------------------------------------------------------------------------------------------
    def clippable(self) -> Iterator[Tensor]:
        """Yield tensors whose ``grad`` are the gradients of all parameters, wherever they are."""
        self._wait()
        for group in self._host_step.optimizer.param_groups:
            for p in group["params"]:
                gradient = self._gradient(p)
                if gradient is None:
                    yield p
                else:
                    shown = gradient.detach()
                    shown.grad = gradient
                    yield shown

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Run the closure, then step whatever has a gradient and was not stepped in backward."""
        host_step = self._host_step
        host_step.begin()
        try:
            if self.step_in_backward and closure is not None:
                entries = host_step.entries(lambda p: p.requires_grad)
                self._positions = {id(entry[1]): entry for entry in entries}
            loss = run_closure(closure)
            if self._bucket:
                self._submit_bucket()
            self._wait()
            left = host_step.entries(lambda p: self._is_due(p))
            host_step.step(left, self._gradient)
            host_step.commit()
            # for those who look at an optimizer after its step, and find no gradients
            host_step.optimizer._memsave_stepped = self._stepped | {id(p) for _, p in left}  # type: ignore[attr-defined]
        finally:
            self._positions = None
            self._bucket = []
            try:
                self._wait()  # after an exception too: nobody writes into the weights from now on
            finally:
                self._stepped.clear()
                self.drop()
        self.refresh()
        return loss

    def _is_due(self, p: Tensor) -> bool:
        return id(p) not in self._stepped and (p.grad is not None or id(p) in self._tickets)

    def drop(self) -> None:
        """Forget the gradients, as ``zero_grad`` does; their memory is used again."""
        for ticket in self._tickets.values():
            ticket.wait()
        self._tickets.clear()

    def close(self) -> None:
        """Take the hooks away and stop the thread; a second call does nothing."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._worker.shutdown(wait=True)
        self._buffers.clear()
        self._tickets.clear()


def _done() -> Future[None]:
    job: Future[None] = Future()
    job.set_result(None)
    return job
