"""The picture of a report: live bytes over a step, stacked by category."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memsave._imports import require
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory._palette import COLORS, LABELS, PHASE_COLORS, STACK
from lightning_memsave.units import GIB, KIB, MIB, format_bytes

if TYPE_CHECKING:
    from lightning_memsave.memory.report import MemoryReport

__all__ = ["draw", "phase_bands", "scale_of"]

_SUFFIXES = (".png", ".svg", ".pdf")


def draw(report: MemoryReport, path: Path) -> Path:
    """Draw the timeline of ``report``; see ``MemoryReport.figure``."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(f"MemoryReport.figure: {path.name!r} should end in one of {', '.join(_SUFFIXES)}.")
    require("matplotlib", "MemoryReport.figure")
    figure_class = require("matplotlib.figure", "MemoryReport.figure").Figure  # no pyplot: no global state, no window
    figure = figure_class(figsize=(11, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    unit, factor = scale_of(report.peak_bytes)
    _stack(report, axes, factor)
    _phases(report, axes)
    _peak(report, axes, factor)
    _dress(report, figure, axes, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def scale_of(nbytes: int) -> tuple[str, int]:
    """Return the unit to show ``nbytes`` in, and its bytes."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= factor:
            return unit, factor
    return "bytes", 1


def phase_bands(report: MemoryReport) -> list[tuple[str, float, float]]:
    """Return ``(phase, from, to)`` along the points of the timeline, in points."""
    bands: list[tuple[str, float, float]] = []
    for index, phase in enumerate(report.timeline.phases):
        if bands and bands[-1][0] == phase:
            bands[-1] = (phase, bands[-1][1], index + 1.0)
        else:
            bands.append((phase, float(index), index + 1.0))
    return bands


def _stack(report: MemoryReport, axes: Any, factor: int) -> None:
    timeline = report.timeline
    edges = list(range(len(timeline.phases) + 1))
    base = [0.0] * len(edges)
    for name in STACK:
        values = timeline.bytes_by_category.get(name, ())
        if not any(values):
            continue
        top = [b + v / factor for b, v in zip(base, (*values, values[-1]))]
        axes.fill_between(edges, base, top, step="post", color=COLORS[name], label=LABELS[name], linewidth=0)
        base = top
    axes.set_xlim(0, max(1, len(timeline.phases)))
    axes.set_ylim(0, max(1e-9, report.peak_bytes / factor) * 1.16)


def _phases(report: MemoryReport, axes: Any) -> None:
    bands = phase_bands(report)
    width = max(1, len(report.timeline.phases))
    transform = axes.get_xaxis_transform()
    for name, start, end in bands:
        axes.axvspan(start, end, ymin=0.965, ymax=1.0, color=PHASE_COLORS[name], alpha=0.9, linewidth=0)
        if start and (end - start) / width > 0.01:
            axes.axvline(start, color="#30363d", alpha=0.25, linewidth=0.7, linestyle=(0, (3, 3)))
        if (end - start) / width > 0.055:
            middle = (start + end) / 2
            style = {"ha": "center", "va": "center", "color": "white", "fontsize": 8.5, "fontweight": "bold"}
            axes.text(middle, 0.982, name, transform=transform, **style)


def _peak(report: MemoryReport, axes: Any, factor: int) -> None:
    width = max(1, len(report.timeline.phases))
    x, y = report.timeline.peak_point + 0.5, report.peak_bytes / factor
    axes.axhline(y, color="#1f2328", linewidth=0.8, linestyle=(0, (5, 4)), alpha=0.7)
    axes.plot([x], [y], marker="o", markersize=6, color="#1f2328", markeredgecolor="white", zorder=5)
    left = x < width * 0.6
    axes.annotate(
        f"peak {format_bytes(report.peak_bytes)}",
        (x, y),
        xytext=(9 if left else -9, 6),
        textcoords="offset points",
        ha="left" if left else "right",
        fontsize=10,
        fontweight="bold",
        color="#1f2328",
    )


def _dress(report: MemoryReport, figure: Any, axes: Any, unit: str) -> None:
    step = f" of step {report.step}" if report.step else ""
    axes.set_title(f"Live memory{step} on {report.device}", loc="left", fontsize=13, fontweight="bold", pad=10)
    events = report.timeline.num_events
    axes.set_xlabel(f"allocations and frees in order ({events:,})", fontsize=9.5, color="#57606a")
    axes.set_ylabel(unit, fontsize=9.5, color="#57606a")
    axes.set_xticks([])
    axes.tick_params(colors="#57606a", labelsize=9)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d0d7de")
    handles, labels = axes.get_legend_handles_labels()
    shares = {LABELS[name]: report.by_category.get(name, 0) for name in STACK}
    labels = [f"{label}  {format_bytes(shares[label])}" for label in labels]
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside right center",
        frameon=False,
        fontsize=9,
        title="at the peak",
        title_fontproperties={"weight": "bold", "size": 9},
        alignment="left",
    )
