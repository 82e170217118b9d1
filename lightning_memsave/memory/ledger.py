"""The categories memory is counted in, and the log of a step from which the true peak is read.

Memory is counted by storage: a view costs nothing, two tied parameters count once. Every storage has one category,
decided by what it *becomes*, so that a gradient is a gradient from the moment its bytes exist:

``weights``
    Parameters that require a gradient, or did so when an optimizer stepped them.
``frozen_weights``
    The rest of the module's state: frozen parameters, buffers, and what quantized weights carry (absmax, codes).
``gradients``
    Storages that become the ``.grad`` of a parameter.
``optimizer_state``
    Storages that are in an optimizer's ``state``.
``activations``
    Made in a forward and alive when the next backward begins; made while backward recomputes a forward and alive
    when the recomputation ends.
``inputs``
    The batch.
``temporaries``
    Everything else made during the step: forward intermediates that nobody kept, gradients of activations,
    intermediates of the optimizer.
``other``
    None of the above: metric states, constants and whatever else is older than the step; the buckets of DDP.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ACTIVATIONS",
    "CATEGORIES",
    "COMMUNICATION",
    "FROZEN_WEIGHTS",
    "GRADIENTS",
    "INPUTS",
    "OPTIMIZER_MODULE",
    "OPTIMIZER_STATE",
    "OTHER",
    "PHASES",
    "TEMPORARIES",
    "UNTRACKED",
    "WEIGHTS",
    "Block",
    "Log",
    "Measurement",
    "Timeline",
    "measure",
]

WEIGHTS = "weights"
FROZEN_WEIGHTS = "frozen_weights"
GRADIENTS = "gradients"
OPTIMIZER_STATE = "optimizer_state"
ACTIVATIONS = "activations"
INPUTS = "inputs"
TEMPORARIES = "temporaries"
OTHER = "other"
CATEGORIES = (
    WEIGHTS,
    FROZEN_WEIGHTS,
    GRADIENTS,
    OPTIMIZER_STATE,
    ACTIVATIONS,
    INPUTS,
    TEMPORARIES,
    OTHER,
)
PHASES = ("forward", "backward", "optimizer", "validation")

UNTRACKED = "(untracked)"  # stands for a module: bytes that were on the device before and belong to no tensor we know
COMMUNICATION = "(communication)"  # stands for a module: buffers that gradients are copied into for other ranks
OPTIMIZER_MODULE = "(optimizer)"  # stands for a module: what optimizer steps allocate for themselves
_TIMELINE_POINTS = 600


class Block:
    """One storage, from its first byte to its last.

    Args:
        nbytes: Bytes it holds now.
        device: Device type.
        module: Qualified name of the module it belongs to, ``""`` for the root.
        category: ``None`` while only its lifetime can tell activations from temporaries.
        candidate: It was made by a forward (or by a recomputed one), so that it may be an activation.
        born: Index of its first event; -1 if it is older than the log.

    """

    __slots__ = ("born", "candidate", "category", "device", "died", "module", "nbytes", "reference")

    def __init__(
        self, nbytes: int, device: str, module: str, category: str | None, *, candidate: bool = False, born: int = -1
    ) -> None:
        self.nbytes = nbytes
        self.device = device
        self.module = module
        self.category = category
        self.candidate = candidate
        self.born = born
        self.died: int | None = None
        self.reference: Any = None

    def settle(self, marks: Sequence[int]) -> str:
        """Return the category, reading an undecided one from the lifetime.

        Args:
            marks: Event indices, ascending, at which a backward began or a recomputation ended.

        """
        if self.category is not None:
            return self.category
        if not self.candidate:
            return TEMPORARIES
        position = bisect_right(marks, self.born)
        if position == len(marks) or (self.died is not None and self.died < marks[position]):
            return TEMPORARIES
        return ACTIVATIONS


@dataclass
class Log:
    """What happened to memory during one step.

    Args:
        initial: ``(block, bytes)`` that existed when the log began.
        events: ``(block, change in bytes, phase)`` in order; the phase is an index into ``PHASES``.
        marks: See ``Block.settle``.
        starts: Event indices at which a backward began; each is a mark too.
        untracked_bytes: Bytes of the device that were allocated before the log began and that no block stands for.

    """

    initial: list[tuple[Block, int]] = field(default_factory=list)
    events: list[tuple[Block, int, int]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    untracked_bytes: int = 0

    def predate(self, block: Block) -> None:
        """Count a block as older than the log, although it was seen late."""
        if block.born >= 0:
            _, nbytes, phase = self.events[block.born]
            self.events[block.born] = (block, 0, phase)
            self.initial.append((block, nbytes))
            block.born = -1

    def main_device(self) -> str:
        """Return the device type the step ran on: the accelerator if it made or held bytes, else who made the most."""
        made: dict[str, int] = {}
        for block, change in (*self.initial, *((block, change) for block, change, _ in self.events)):
            made[block.device] = made.get(block.device, 0) + max(0, change)
        return max(made, key=lambda device: (device not in ("cpu", "meta"), made[device]), default="cpu")


@dataclass(frozen=True)
class Timeline:
    """Live bytes over a step, thinned so that each point is the highest moment of its stretch.

    Args:
        events: Event index of each point.
        phases: Phase of each point.
        bytes_by_category: Per category, live bytes at each point.
        peak_point: Index of the point that is the step's peak.
        num_events: Allocations and frees in the step.

    """

    events: tuple[int, ...] = ()
    phases: tuple[str, ...] = ()
    bytes_by_category: dict[str, tuple[int, ...]] = field(default_factory=dict)
    peak_point: int = 0
    num_events: int = 0

    @property
    def totals(self) -> tuple[int, ...]:
        """Live bytes at each point."""
        return tuple(sum(column) for column in zip(*self.bytes_by_category.values()))


@dataclass(frozen=True)
class Measurement:
    """The memory of one step, on one device.

    Args:
        device: Device type the bytes are on.
        peak_bytes: Highest sum of live bytes.
        by_category: Bytes at the peak; all categories, zeros too; sums to ``peak_bytes``.
        by_module: Bytes at the peak by the module they belong to, then by category; sums to ``peak_bytes``.
        by_phase: Highest sum of live bytes within each phase that occurred.
        saved_for_backward_bytes: Most activation bytes alive when a backward began: what the forward saved.
        timeline: Live bytes over the step.

    """

    device: str
    peak_bytes: int
    by_category: dict[str, int]
    by_module: dict[str, dict[str, int]]
    by_phase: dict[str, int]
    saved_for_backward_bytes: int
    timeline: Timeline


def measure(log: Log, device: str | None = None, *, num_points: int = _TIMELINE_POINTS) -> Measurement:
    """Replay a log and read the true peak from it.

    Args:
        log: A finished log: no block of it changes any more.
        device: Device type to count; ``None`` is the one the step ran on.
        num_points: Points of the timeline.

    Returns:
        The measurement; all sums are exact.

    """
    device = device or log.main_device()
    category_of = {name: index for index, name in enumerate(CATEGORIES)}
    settled: dict[int, int] = {}
    for block in _blocks(log):
        if block.device == device:
            settled[id(block)] = category_of[block.settle(log.marks)]
    current = [0] * len(CATEGORIES)
    current[category_of[OTHER]] = log.untracked_bytes
    for block, nbytes in log.initial:
        if id(block) in settled:
            current[settled[id(block)]] += nbytes
    total = sum(current)
    activations, saved, starts, next_start = category_of[ACTIVATIONS], 0, [*log.starts, len(log.events) + 1], 0
    peak, peak_event, peak_current = total, -1, list(current)
    by_phase: dict[int, int] = {}
    stretch = max(1, -(-len(log.events) // num_points))
    flips = sum(a[2] != b[2] for a, b in zip(log.events, log.events[1:]))
    points: list[tuple[int, int, int, list[int]]] = []  # (total, event, phase, bytes by category)
    best: tuple[int, int, int, list[int]] | None = None
    for index, (block, change, phase) in enumerate(log.events):
        while starts[next_start] <= index:
            saved, next_start = max(saved, current[activations]), next_start + 1
        category = settled.get(id(block))
        if category is not None:
            current[category] += change
            total += change
        if total > by_phase.get(phase, -1):
            by_phase[phase] = total
        if total > peak:
            peak, peak_event, peak_current = total, index, list(current)
        if best is None or total > best[0]:
            best = (total, index, phase, list(current))
        if (index + 1) % stretch == 0 or (flips <= num_points and phase != _phase_after(log.events, index)):
            points.append(best)
            best = None
    if next_start < len(log.starts):
        saved = max(saved, current[activations])
    if peak_event == -1:
        points.insert(0, (peak, -1, 0, peak_current))
    return Measurement(
        device=device,
        peak_bytes=peak,
        by_category=dict(zip(CATEGORIES, peak_current)),
        by_module=_modules_at(log, settled, peak_event),
        by_phase={PHASES[phase]: by_phase[phase] for phase in sorted(by_phase)},
        saved_for_backward_bytes=saved,
        timeline=_timeline(points, peak_event, len(log.events)),
    )


def _blocks(log: Log) -> Iterable[Block]:
    yield from (block for block, _ in log.initial)
    yield from (block for block, _, _ in log.events)


def _phase_after(events: Sequence[tuple[Block, int, int]], index: int) -> int:
    return events[index + 1][2] if index + 1 < len(events) else -1


def _modules_at(log: Log, settled: dict[int, int], event: int) -> dict[str, dict[str, int]]:
    """Return bytes by module and category right after ``event``, largest module first."""
    live: dict[int, list[Any]] = {}
    changes = [*log.initial, *((block, change) for block, change, _ in log.events[: event + 1])]
    for block, change in changes:
        if id(block) in settled:
            live.setdefault(id(block), [block, 0])[1] += change
    modules: dict[str, dict[str, int]] = {}
    for block, nbytes in live.values():
        if nbytes:
            row = modules.setdefault(block.module, {})
            category = CATEGORIES[settled[id(block)]]
            row[category] = row.get(category, 0) + nbytes
    if log.untracked_bytes:
        modules[UNTRACKED] = {OTHER: log.untracked_bytes}
    return dict(sorted(modules.items(), key=lambda item: (-sum(item[1].values()), item[0])))


def _timeline(points: list[tuple[int, int, int, list[int]]], peak_event: int, num_events: int) -> Timeline:
    events = tuple(event for _, event, _, _ in points)
    return Timeline(
        events=events,
        phases=tuple(PHASES[phase] for _, _, phase, _ in points),
        bytes_by_category={name: tuple(p[3][i] for p in points) for i, name in enumerate(CATEGORIES)},
        peak_point=events.index(peak_event) if peak_event in events else 0,
        num_events=num_events,
    )
