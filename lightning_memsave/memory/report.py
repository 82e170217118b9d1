"""The result of profiling: where the peak's bytes are, as a table, a picture, a page and a file."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_memsave._imports import require
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory._palette import LABELS, STACK, group_modules, module_label
from lightning_memsave.memory.ledger import CATEGORIES, Measurement, Timeline
from lightning_memsave.units import format_bytes

__all__ = ["MemoryReport", "last_report", "set_last_report"]

_FORMAT = "lightning_memsave.memory/1"
_TABLE_MODULES = 10


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The memory of one training step at its true peak.

    Bytes are exact counts of tensor storages. The meaning of each category is written in
    ``lightning_memsave.memory.ledger``.

    Args:
        peak_bytes: Highest sum of live tensor bytes on the training device.
        by_category: Bytes at the peak of ``weights``, ``frozen_weights``, ``gradients``, ``optimizer_state``,
            ``activations``, ``inputs``, ``temporaries`` and ``other``; they sum to ``peak_bytes``.
        by_module: Bytes at the peak by qualified module name, largest first; they sum to ``peak_bytes``. The name
            ``""`` holds what ran outside of submodules.
        by_phase: Highest sum of live bytes in ``forward``, ``backward``, ``optimizer`` and ``validation``.
        saved_for_backward_bytes: Activations alive when the backward began.
        reserved_bytes: Most bytes CUDA's allocator took from the device; ``None`` without CUDA.
        host_peak_bytes: Highest resident set of this process during the run; zero where the system does not say.
        step_seconds: Median duration of a training step that was not profiled; of the profiled step if none was.
        device: Device type the bytes are on.
        step: Which training step had the peak, 1-based; zero for a step outside of a Trainer.
        by_module_category: ``by_module``, divided by category.
        by_rank: ``peak_bytes`` of each rank, if there were several.
        host_allocator: The process allocator, without which ``host_peak_bytes`` cannot be compared.
        notes: What limits the meaning of the numbers.
        timeline: Live bytes by category over the step.

    """

    peak_bytes: int
    by_category: dict[str, int]
    by_module: dict[str, int]
    by_phase: dict[str, int]
    saved_for_backward_bytes: int
    reserved_bytes: int | None = None
    host_peak_bytes: int = 0
    step_seconds: float = 0.0
    device: str = "cpu"
    step: int = 0
    by_module_category: dict[str, dict[str, int]] = field(default_factory=dict)
    by_rank: tuple[int, ...] = ()
    host_allocator: str | None = None
    notes: tuple[str, ...] = ()
    timeline: Timeline = field(default_factory=Timeline)

    @classmethod
    def from_measurement(cls, measurement: Measurement, **fields: Any) -> MemoryReport:
        """Make a report of one measured step.

        Args:
            measurement: From ``MemoryTracker.measurement()``.
            **fields: What the measurement does not know: ``step_seconds``, ``host_peak_bytes`` ...

        """
        return cls(
            peak_bytes=measurement.peak_bytes,
            by_category=dict(measurement.by_category),
            by_module={name: sum(row.values()) for name, row in measurement.by_module.items()},
            by_phase=fields.pop("by_phase", None) or dict(measurement.by_phase),
            saved_for_backward_bytes=measurement.saved_for_backward_bytes,
            device=measurement.device,
            by_module_category={name: dict(row) for name, row in measurement.by_module.items()},
            timeline=measurement.timeline,
            **fields,
        )

    def table(self, width: int = 100) -> str:
        """Return the report as text: categories, phases and the largest modules.

        Args:
            width: Columns of text.

        """
        console_module, table_module = require("rich.console", "MemoryReport.table"), require("rich.table", "table")
        box = require("rich.box", "MemoryReport.table")
        stream = io.StringIO()
        console = console_module.Console(file=stream, width=width)

        def table(*columns: str) -> Any:
            made = table_module.Table(box=box.SIMPLE_HEAD, pad_edge=False)
            made.add_column(columns[0], overflow="fold")
            for name in columns[1:]:
                made.add_column(name, justify="right")
            return made

        head = f"Peak {format_bytes(self.peak_bytes)} on {self.device}" + (f", step {self.step}" if self.step else "")
        console.print(head, style="bold", highlight=False)
        categories = table("category", "bytes at the peak", "share")
        for name in STACK:
            if self.by_category.get(name):
                categories.add_row(
                    LABELS[name], format_bytes(self.by_category[name]), self._share(self.by_category[name])
                )
        console.print(categories)
        phases = table("phase", "peak")
        for name, nbytes in self.by_phase.items():
            phases.add_row(name, format_bytes(nbytes))
        console.print(phases)
        modules = table("module", "number", "bytes at the peak", "share")
        for name, number, row in group_modules(self.by_module_category)[:_TABLE_MODULES]:
            total = sum(row.values())
            modules.add_row(module_label(name), str(number), format_bytes(total), self._share(total))
        console.print(modules)
        for line in self.facts():
            console.print(line, highlight=False)
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def facts(self) -> list[str]:
        """Return what else is known, one sentence each."""
        lines = [f"Saved for backward: {format_bytes(self.saved_for_backward_bytes)}"]
        if self.reserved_bytes is not None:
            lines.append(f"Reserved by the CUDA allocator: {format_bytes(self.reserved_bytes)}")
        if self.host_peak_bytes:
            allocator = f" (process allocator: {self.host_allocator})" if self.host_allocator else ""
            lines.append(f"Peak resident set of the process: {format_bytes(self.host_peak_bytes)}{allocator}")
        if self.step_seconds:
            lines.append(f"Step: {self.step_seconds:.4g} s")
        if len(self.by_rank) > 1:
            lines.append("Peak by rank: " + ", ".join(format_bytes(nbytes) for nbytes in self.by_rank))
        return lines + [f"Note: {note}" for note in self.notes]

    def figure(self, path: str | Path) -> Path:
        """Draw the step's live bytes, stacked by category, with its phases and the peak.

        Args:
            path: Ends in ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            ConfigurationError: If the ending is another.
            MissingDependencyError: If matplotlib is not installed.

        """
        from lightning_memsave.memory.figure import draw

        return draw(self, Path(path))

    def to_html(self, path: str | Path) -> Path:
        """Write one page that needs no network.

        It shows the timeline with what is under the pointer, the categories, the phases and the modules.
        """
        from lightning_memsave.memory.html import render

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(self), encoding="utf-8")
        return path

    def to_json(self, path: str | Path) -> Path:
        """Write every field; ``from_json`` reads it back equal."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1), encoding="utf-8")
        return path

    @classmethod
    def from_json(cls, path: str | Path) -> MemoryReport:
        """Read what ``to_json`` wrote.

        Raises:
            ConfigurationError: If the file is something else.

        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"MemoryReport.from_json: {path} is not JSON: {error}.") from error
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found != _FORMAT:
            raise ConfigurationError(
                f"MemoryReport.from_json: {path} holds format {found!r}, expected {_FORMAT!r}. "
                "Give a file that MemoryReport.to_json or MemoryProfiler wrote."
            )
        line = data.pop("timeline")
        timeline = Timeline(
            events=tuple(line["events"]),
            phases=tuple(line["phases"]),
            bytes_by_category={name: tuple(row) for name, row in line["bytes_by_category"].items()},
            peak_point=line["peak_point"],
            num_events=line["num_events"],
        )
        by_rank, notes = tuple(data.pop("by_rank")), tuple(data.pop("notes"))
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(timeline=timeline, by_rank=by_rank, notes=notes, **{k: v for k, v in data.items() if k in known})

    def scalars(self) -> dict[str, int]:
        """Return what loggers get: ``memory/peak_bytes`` and ``memory/<category>_bytes``."""
        values = {f"memory/{name}_bytes": self.by_category.get(name, 0) for name in CATEGORIES}
        return {"memory/peak_bytes": self.peak_bytes, **values}

    def _share(self, nbytes: int) -> str:
        return f"{100 * nbytes / self.peak_bytes:.1f} %" if self.peak_bytes else "-"


_last: list[MemoryReport] = []


def last_report() -> MemoryReport | None:
    """Return the report of this process's last profiled fit, or ``None``.

    It is the way to the numbers where a project copies callbacks or hides its Trainer.
    """
    return _last[0] if _last else None


def set_last_report(report: MemoryReport | None) -> None:
    """Make a report the one that ``last_report`` returns."""
    _last[:] = [] if report is None else [report]
