"""Average gradients over data-parallel ranks inside backward, a bucket at a time, without a second copy of them.

``DistributedDataParallel`` keeps all gradients once more, in the buckets of its reducer. Here a bucket exists while it
is in flight only. Every rank issues the same collectives in the same order in every synchronized backward, whatever its
own graph looks like: buckets are reduced in the order of one list, one never before its predecessor, and what got no
gradient by the end of backward is reduced then, as zeros.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_memsave.parallel._flight import Flight
from lightning_memsave.parallel.buckets import Bucket, make_buckets, trained_parameters
from lightning_memsave.parallel.same_state import check_same_plan, global_rank

__all__ = ["BlockReducer"]

# Buckets that may be under way while backward computes: enough to hide one behind the next, few enough to be small.
_IN_FLIGHT = 2


class BlockReducer:
    """Hooks on a module's parameters that average their gradients over a process group inside backward.

    What ``DistributedDataParallel(find_unused_parameters=True)`` leaves in ``p.grad``, this leaves there: a gradient
    that some rank has is averaged over all (those without one count as zeros), one that no rank has stays as it was.
    Between ``no_sync`` passes and the next synchronized one gradients add up as they do there.

    Use::

        reducer = BlockReducer(module, bucket_bytes=25 << 20)
        with reducer.watch(loss):
            loss.backward()
        reducer.close()

    Args:
        module: Its parameters that require a gradient take part; those that are unfrozen later join.
        bucket_bytes: Largest size of a bucket of several gradients; a larger gradient is reduced where it is.
        group: The process group, ``None`` for the default one.
        ignored: Qualified names of parameters to leave alone.
        hooks: ``fn(parameter)`` in an ordered dict, called when a gradient holds the average; may change any time.
        sending_hooks: The same, called before a gradient is sent.
        on_unused: Called with ``(names, everywhere)`` the first time trained parameters got no gradient on this rank.
        subject: The public class that asks, for messages.

    """

    def __init__(
        self,
        module: nn.Module,
        *,
        bucket_bytes: int,
        group: dist.ProcessGroup | None = None,
        ignored: Sequence[str] = (),
        hooks: OrderedDict[int, Callable[[nn.Parameter], Any]] | None = None,
        sending_hooks: OrderedDict[int, Callable[[nn.Parameter], Any]] | None = None,
        on_unused: Callable[[list[str], bool], None] | None = None,
        subject: str = "BlockReducer",
    ) -> None:
        self.module, self.bucket_bytes, self.group, self.subject = module, bucket_bytes, group, subject
        self.ignored, self.on_unused = tuple(ignored), on_unused
        self.hooks = OrderedDict() if hooks is None else hooks
        self.sending_hooks = OrderedDict() if sending_hooks is None else sending_hooks
        self.world_size = dist.get_world_size(group)
        self.sync = True
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.buckets: list[Bucket] = []
        self._bucket_of: list[int] = []
        self._handles: list[RemovableHandle] = []
        self._touched: set[int] = set()  # got a gradient since the last synchronized backward
        self._reported: set[int] = set()
        self._learned = False
        self._pass: _Pass | None = None
        self._lock = threading.RLock()  # autograd runs one thread per device
        self.prepare()

    # -- life -----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Take the hooks away; a second call does nothing."""
        self.abort()
        while self._handles:
            self._handles.pop().remove()

    def register_reduced_hook(self, function: Callable[[nn.Parameter], Any]) -> RemovableHandle:
        """Call ``function(parameter)`` inside backward once ``parameter.grad`` holds the average over the ranks.

        On every rank for the same parameters; their order is the same on every rank but for those without a gradient
        of their own, which come last. It may set ``parameter.grad`` to ``None``.
        """
        return _add(self.hooks, function)

    def register_sending_hook(self, function: Callable[[nn.Parameter], Any]) -> RemovableHandle:
        """Call ``function(parameter)`` before this rank's gradient is sent; it may add to it, or make it.

        For gradients that are kept elsewhere during ``no_sync`` passes: it is called for every parameter, also if this
        backward gave it none.
        """
        return _add(self.sending_hooks, function)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on this rank: backward passes begun inside communicate nothing."""
        before, self.sync = self.sync, False
        try:
            yield
        finally:
            self.sync = before

    @contextmanager
    def watch(self, loss: Tensor) -> Iterator[None]:
        """Take part in the backward passes from this loss on every rank, even where no parameter gets a gradient."""
        self.prepare()
        handle = loss.register_hook(self._on_loss) if loss.requires_grad else None  # type: ignore[no-untyped-call]
        try:
            yield
        except BaseException:
            self.abort()
            raise
        finally:
            if handle is not None:
                handle.remove()

    def abort(self) -> None:
        """Forget a pass that an exception ended: its last callback never ran."""
        self._pass = None

    # -- plan -----------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Make the plan, and make it anew when parameters were unfrozen or replaced."""
        if self._pass is not None:
            return
        planned = {id(parameter) for parameter in self.parameters}
        trained = {id(parameter) for parameter in self.module.parameters() if parameter.requires_grad}
        if self._handles and trained <= planned:
            return
        named = trained_parameters(self.module, self.parameters, self.ignored, subject=self.subject)
        if self._handles and {id(parameter) for _, parameter in named} == planned:
            return  # what is new is on the list of the ignored
        if self.world_size > 1:
            check_same_plan(named, self.group, subject=self.subject)
        while self._handles:
            self._handles.pop().remove()
        touched = {id(self.parameters[index]) for index in self._touched}
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._touched = {index for index, parameter in enumerate(self.parameters) if id(parameter) in touched}
        self._reported, self._learned = set(), False
        self._cut(range(len(self.parameters) - 1, -1, -1))
        for index, parameter in enumerate(self.parameters):
            hooked = parameter.requires_grad
            parameter.requires_grad_(True)  # torch refuses the hook on one that is frozen at the moment
            hook = parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
            self._handles.append(hook)
            parameter.requires_grad_(hooked)

    def _cut(self, order: Sequence[int]) -> None:
        self.buckets = make_buckets(self.parameters, order, self.bucket_bytes)
        self._bucket_of = [0] * len(self.parameters)
        for number, bucket in enumerate(self.buckets):
            for index in bucket.indices:
                self._bucket_of[index] = number

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        return lambda parameter: self._arrive(index)

    # -- one backward ---------------------------------------------------------------------------------------------
    def _on_loss(self, gradient: Tensor) -> None:
        with self._lock:
            self._open()

    def _open(self) -> _Pass:
        """Begin a pass in the innermost running backward; its last act is ``_close``."""
        if self._pass is None:
            self.prepare()
            self._pass = _Pass(self)
            torch.autograd.Variable._execution_engine.queue_callback(self._close)
        return self._pass

    def _arrive(self, index: int) -> None:
        with self._lock, torch.no_grad():
            now = self._open()
            self._touched.add(index)
            if now.sync:
                now.arrive(index)

    def _close(self) -> None:
        with self._lock, torch.no_grad():
            now, self._pass = self._pass, None
            if now is None or not now.sync:
                return
            now.finish()
            self._report(now)
            self._touched.clear()
            if not self._learned and self.world_size > 1:
                self._learn(now)

    def _report(self, now: _Pass) -> None:
        """Say once which trained parameters got no gradient."""
        missing = [
            index
            for index, parameter in enumerate(self.parameters)
            if index not in self._touched and parameter.requires_grad and index not in self._reported
        ]
        self._reported.update(missing)
        for everywhere in (True, False):
            names = [self.names[index] for index in missing if (index not in now.used_elsewhere) is everywhere]
            if names and self.on_unused is not None:
                self.on_unused(names, everywhere)

    def _learn(self, now: _Pass) -> None:
        """Order the buckets as gradients arrived on rank zero; what some rank did not use comes last.

        Once, since the order must be agreed on. A parameter that is often without a gradient would hold back all that
        come after it until the end of backward.
        """
        self._learned = True
        count = len(self.parameters)
        used = torch.zeros(count)
        for bucket, flags in now.flags:
            used[list(bucket.indices)] = flags.float().cpu()
        always = set((used > self.world_size - 0.5).nonzero().flatten().tolist())
        device = self.parameters[0].device if count else torch.device("cpu")
        arrived = [*now.arrived, *([-1] * (count - len(now.arrived)))]
        order = torch.tensor(arrived, dtype=torch.int64, device=device)
        dist.broadcast(order, src=global_rank(self.group), group=self.group)
        first = [index for index in order.tolist() if index in always]
        late = set(range(count)).difference(first)
        self._cut([*first, *sorted(late, reverse=True)])


def _add(
    hooks: OrderedDict[int, Callable[[nn.Parameter], Any]], function: Callable[[nn.Parameter], Any]
) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = function
    return handle


class _Pass:
    """One backward: which gradients arrived, which buckets left, which are under way."""

    def __init__(self, reducer: BlockReducer) -> None:
        self.reducer = reducer
        self.sync = reducer.sync
        self.arrived: list[int] = []
        self.flags: list[tuple[Bucket, Tensor]] = []
        self.used_elsewhere: set[int] = set()
        self._next = 0
        self._here: set[int] = set()
        self._flights: deque[Flight] = deque()
        self._streams: list[torch.Stream] = []
        # What is frozen at the moment (a toggled optimizer, a frozen encoder) is not waited for.
        expected = [parameter.requires_grad for parameter in reducer.parameters]
        self._missing = [sum(expected[index] for index in bucket.indices) for bucket in reducer.buckets]
        self._expected = expected

    def arrive(self, index: int) -> None:
        """Note a gradient and send every bucket whose turn it is."""
        reducer = self.reducer
        number = reducer._bucket_of[index]
        self._check(index, sent=number < self._next or reducer.world_size == 1)
        if index in self._here:
            return
        self._here.add(index)
        self.arrived.append(index)
        self._note_stream(reducer.parameters[index].device)
        if reducer.world_size == 1:
            self._prepare(index)
            self._deliver(index)
            return
        self._missing[number] -= self._expected[index]
        while self._next < len(self._missing) and self._missing[self._next] == 0:
            self._send()

    def _check(self, index: int, *, sent: bool) -> None:
        reducer, name = self.reducer, self.reducer.names[index]
        gradient = reducer.parameters[index].grad
        if gradient is not None and gradient.layout is not torch.strided:
            raise RuntimeError(
                f"{reducer.subject}: the gradient of {name} is sparse ({gradient.layout}), and dense ones are "
                'averaged. Make it dense, or use strategy="ddp".'
            )
        if index in self._here and sent and (reducer.world_size > 1 or reducer.hooks):
            raise RuntimeError(
                f"{reducer.subject}: {name} got a second gradient in one backward, after its first was averaged. "
                "Reentrant checkpointing does that to shared parameters: pass use_reentrant=False to "
                "torch.utils.checkpoint, or use ActivationCheckpointing."
            )

    def _note_stream(self, device: torch.device) -> None:
        if device.type != "cpu":
            stream = torch.accelerator.current_stream(device)
            if stream not in self._streams:
                self._streams.append(stream)

    def _join_streams(self) -> None:
        """Order this stream after all on which gradients were made: a module may run parts of itself on its own."""
        if len(self._streams) > 1:
            here = torch.accelerator.current_stream(self._streams[0].device)
            for stream in self._streams:
                if stream != here:
                    here.wait_stream(stream)

    def finish(self) -> None:
        """Reduce what is left, in order, and wait for all of it."""
        if self.reducer.world_size == 1:
            for index in range(len(self.reducer.parameters)):
                if index not in self._here:
                    self._prepare(index)
                    if index in self.reducer._touched:
                        self._deliver(index)
            return
        while self._next < len(self.reducer.buckets):
            self._send()
        while self._flights:
            self._land()

    def _send(self) -> None:
        reducer, bucket = self.reducer, self.reducer.buckets[self._next]
        self._next += 1
        while len(self._flights) >= _IN_FLIGHT:
            self._land()
        self._join_streams()
        for index in bucket.indices:
            self._prepare(index)
        members = [reducer.parameters[index] for index in bucket.indices]
        used = [index in reducer._touched for index in bucket.indices]
        self._flights.append(Flight(bucket, members, used, reducer.group, reducer.world_size))

    def _land(self) -> None:
        """Wait for the oldest bucket and give the averages out."""
        flight = self._flights.popleft()
        used = flight.land()
        if not self.reducer._learned:
            self.flags.append((flight.bucket, flight.flags.clone()))
        indices = [index for index, flag in zip(flight.bucket.indices, used) if flag]
        self.used_elsewhere.update(index for index in indices if index not in self.reducer._touched)
        del flight  # with its buffer, before the gradients are used
        for index in indices:
            self._deliver(index)

    def _prepare(self, index: int) -> None:
        """Let the gradient be completed; one that is made here counts as this rank's own."""
        parameter = self.reducer.parameters[index]
        had_none = parameter.grad is None
        for function in list(self.reducer.sending_hooks.values()):
            function(parameter)
        if had_none and parameter.grad is not None:
            self.reducer._touched.add(index)

    def _deliver(self, index: int) -> None:
        parameter = self.reducer.parameters[index]
        if len(self._streams) > 1 and parameter.grad is not None:  # may be freed here, and was made elsewhere
            parameter.grad.record_stream(torch.accelerator.current_stream(parameter.device))
        for function in list(self.reducer.hooks.values()):
            function(parameter)
