"""The report as one page that needs no network: inline SVG, a few lines of script, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING

from lightning_memsave.memory._html_parts import PAGE, SCRIPT, STYLE
from lightning_memsave.memory._palette import COLORS, LABELS, PHASE_COLORS, STACK, group_modules, module_label
from lightning_memsave.memory.figure import phase_bands, scale_of
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning_memsave.memory.report import MemoryReport

__all__ = ["render"]

_WIDTH, _HEIGHT, _TOP = 1000.0, 320.0, 26.0  # of the plot, in SVG units


def render(report: MemoryReport) -> str:
    """Return the page."""
    subtitle = [f"step {report.step}" if report.step else "", report.device, f"{report.step_seconds:.4g} s per step"]
    fields = {
        "style": STYLE + "\n" + "\n".join(f".c-{name}{{--c:{color}}}" for name, color in COLORS.items()),
        "peak": format_bytes(report.peak_bytes),
        "subtitle": escape(" \u00b7 ".join(part for part in subtitle if part)),
        "cards": _cards(report),
        "plot": _plot(report),
        "legend": _legend(report),
        "phases": _phase_rows(report),
        "groups": _module_rows(report, grouped=True),
        "modules": _module_rows(report, grouped=False),
        "notes": "".join(f"<li>{escape(line)}</li>" for line in report.facts()),
        "data": _data(report),
        "script": SCRIPT,
    }
    page = PAGE
    for name, text in fields.items():
        page = page.replace(f"@@{name}@@", text)
    return page


def _bar(row: Mapping[str, int], scale: int) -> str:
    """Return a stacked bar; its full width stands for ``scale`` bytes."""
    parts = [
        f'<i class="c-{name}" style="width:{100 * row[name] / max(1, scale):.3f}%" '
        f'title="{LABELS[name]} {format_bytes(row[name])}"></i>'
        for name in STACK
        if row.get(name)
    ]
    return f'<span class="bar">{"".join(parts)}</span>'


def _cards(report: MemoryReport) -> str:
    cards = [("saved for backward", report.saved_for_backward_bytes)]
    if report.reserved_bytes is not None:
        cards.append(("reserved by CUDA", report.reserved_bytes))
    if report.host_peak_bytes:
        cards.append(("process peak RSS", report.host_peak_bytes))
    return "".join(f'<div class="card"><b>{format_bytes(n)}</b><span>{name}</span></div>' for name, n in cards)


def _plot(report: MemoryReport) -> str:
    """Return the SVG: bands of the phases, one step area per category, axis lines and the peak."""
    timeline, count = report.timeline, max(1, len(report.timeline.phases))
    top = max(1, report.peak_bytes) * 1.08
    unit, factor = scale_of(report.peak_bytes)

    def x(point: float) -> float:
        return point * _WIDTH / count

    def y(nbytes: float) -> float:
        return _TOP + _HEIGHT * (1 - nbytes / top)

    shapes = []
    for name, start, end in phase_bands(report):
        color, left, width = PHASE_COLORS[name], x(start), x(end) - x(start)
        shapes.append(f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="18" rx="2" fill="{color}"/>')
        shapes.append(
            f'<rect x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{_HEIGHT}" fill="{color}" opacity=".07"/>'
        )
        if width > 55:
            shapes.append(f'<text class="phase" x="{left + width / 2:.1f}" y="13">{name}</text>')
    for nbytes in _ticks(report.peak_bytes):
        shapes.append(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y(nbytes):.1f}" y2="{y(nbytes):.1f}"/>')
        shapes.append(f'<text class="tick" x="-8" y="{y(nbytes) + 4:.1f}">{nbytes / factor:g} {unit}</text>')
    base = [0] * len(timeline.phases)
    for name in STACK:
        values = timeline.bytes_by_category.get(name, ())
        if any(values):
            upper = [b + v for b, v in zip(base, values)]
            shapes.append(f'<path class="c-{name} area" d="{_area(base, upper, x, y)}"/>')
            base = upper
    peak_x, peak_y = x(timeline.peak_point + 0.5), y(report.peak_bytes)
    anchor = "start" if peak_x < _WIDTH * 0.7 else "end"
    shift = 9 if anchor == "start" else -9
    shapes.append(f'<line class="peak" x1="0" x2="{_WIDTH}" y1="{peak_y:.1f}" y2="{peak_y:.1f}"/>')
    shapes.append(f'<circle class="peak" cx="{peak_x:.1f}" cy="{peak_y:.1f}" r="4.5"/>')
    label = f"peak {format_bytes(report.peak_bytes)}"
    shapes.append(
        f'<text class="peak" x="{peak_x + shift:.1f}" y="{peak_y - 7:.1f}" text-anchor="{anchor}">{label}</text>'
    )
    shapes.append(f'<line id="cursor" x1="0" x2="0" y1="{_TOP}" y2="{_TOP + _HEIGHT}" visibility="hidden"/>')
    box = f"-84 0 {_WIDTH + 92} {_TOP + _HEIGHT + 8}"
    return f'<svg id="plot" viewBox="{box}" role="img" aria-label="Live bytes by category">{"".join(shapes)}</svg>'


def _area(lower: list[int], upper: list[int], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """Return the path between two step curves; runs of equal height are one line."""

    def walk(values: list[int]) -> list[str]:
        steps, previous = [], None
        for index, value in enumerate(values):
            if value != previous:
                if previous is not None:
                    steps.append(f"{x(index):.1f},{y(previous):.1f}")
                steps.append(f"{x(index):.1f},{y(value):.1f}")
                previous = value
        steps.append(f"{x(len(values)):.1f},{y(values[-1]):.1f}")
        return steps

    return "M" + "L".join([*walk(upper), *walk(lower)[::-1]]) + "Z"


def _ticks(peak: int) -> list[float]:
    """Return a few round byte values from zero to the peak, round in the unit that is shown."""
    _, factor = scale_of(peak)
    shown = peak / factor
    step = next(
        (s * 10.0**e for e in range(-3, 5) for s in (1, 2, 5) if shown / (s * 10.0**e) <= 6),
        shown or 1.0,
    )
    return [round(i * step, 6) * factor for i in range(int(shown / step) + 1)]


def _legend(report: MemoryReport) -> str:
    rows = []
    for name in STACK[::-1]:
        nbytes = report.by_category.get(name, 0)
        if nbytes:
            share = 100 * nbytes / max(1, report.peak_bytes)
            rows.append(
                f'<tr><td><i class="dot c-{name}"></i>{LABELS[name]}</td><td class="n">{format_bytes(nbytes)}</td>'
                f'<td class="n dim">{share:.1f} %</td><td class="w">{_bar({name: nbytes}, report.peak_bytes)}</td></tr>'
            )
    return "".join(rows)


def _phase_rows(report: MemoryReport) -> str:
    return "".join(
        f'<tr><td><i class="dot" style="--c:{PHASE_COLORS[name]}"></i>{name}</td><td class="n">{format_bytes(n)}</td>'
        f'<td class="w"><span class="bar"><i style="--c:{PHASE_COLORS[name]};width:'
        f'{100 * n / max(1, report.peak_bytes):.2f}%"></i></span></td></tr>'
        for name, n in report.by_phase.items()
    )


def _module_rows(report: MemoryReport, *, grouped: bool) -> str:
    modules = report.by_module_category
    rows = group_modules(modules) if grouped else [(name, 1, row) for name, row in modules.items()]
    largest = max((sum(row.values()) for _, _, row in rows), default=1)
    cells = []
    for name, number, row in rows:
        total = sum(row.values())
        times = f' <span class="dim">\u00d7 {number}</span>' if number > 1 else ""
        cells.append(
            f'<tr><td class="m">{escape(module_label(name))}{times}</td><td class="n">{format_bytes(total)}</td>'
            f'<td class="n dim">{100 * total / max(1, report.peak_bytes):.1f} %</td>'
            f'<td class="w">{_bar(row, largest)}</td></tr>'
        )
    return "".join(cells)


def _data(report: MemoryReport) -> str:
    shown = [name for name in STACK if any(report.timeline.bytes_by_category.get(name, ()))]
    data = {
        "width": _WIDTH,
        "phases": list(report.timeline.phases),
        "categories": [[name, LABELS[name], list(report.timeline.bytes_by_category[name])] for name in shown],
    }
    return json.dumps(data).replace("<", "\\u003c")
