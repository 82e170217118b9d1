"""What the quickstart shows: tables in the terminal and one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memsave.memory._palette import COLORS, LABELS, STACK
from lightning_memsave.units import MIB

if TYPE_CHECKING:
    from quickstart import Result

# Full fine-tuning under bf16 autocast follows fp32 this closely at every step (worst difference seen: 0.018).
LOSS_TOLERANCE = 0.05

LINE_COLORS = {"plain": "#57606a", "trio": "#d6506a", "qlora": "#3d6fb4"}
_INK, _MUTED, _GRID = "#1f2328", "#57606a", "#d0d7de"
_BARS = "▁▂▃▄▅▆▇█"


def saved(result: Result, plain: Result) -> float:
    """Return the share of the plain run's peak that a run does without."""
    return 1 - result.peak_bytes / plain.peak_bytes


def loss_deviation(result: Result, plain: Result) -> float:
    """Return the largest difference of two loss curves at one step."""
    return max(abs(a - b) for a, b in zip(result.losses, plain.losses))


def sparkline(values: list[float], low: float, high: float) -> str:
    """Draw numbers as a line of block characters between two bounds."""
    top = len(_BARS) - 1
    return "".join(_BARS[round(top * (v - low) / (high - low or 1.0))] for v in values)


# -- terminal ----------------------------------------------------------------------------------------------------------
def print_results(results: Mapping[str, Result], titles: Mapping[str, str], output: Path, seconds: float) -> None:
    """Print the peak by category, what the process took, the speed and the losses of every run."""
    from rich.console import Console

    console = Console()
    console.print()
    console.print(_memory_table(results, titles))
    console.print(_loss_table(results))
    plain, trio = results["plain"], results["trio"]
    deviation = loss_deviation(trio, plain)
    verdict = "within" if deviation <= LOSS_TOLERANCE else "[bold red]outside of[/]"
    console.print(
        f"The trio trains every weight in [bold green]{saved(trio, plain):.0%} less[/] memory than the plain run; its "
        f"loss stays {verdict} {LOSS_TOLERANCE} of it (largest difference {deviation:.4f})."
    )
    console.print(
        "Peaks are live tensor bytes of a training step. The process holds more: libraries, and what its allocator "
        f"({plain.allocator}) keeps."
    )
    console.print(
        f"\nWrote {output}/memory.png, {output}/results.json and {output}/*/memsave/memory.html in {seconds:.0f} s."
    )


def _memory_table(results: Mapping[str, Result], titles: Mapping[str, str]) -> Any:
    from rich import box
    from rich.table import Table

    plain = results["plain"]
    table = Table(title="Memory at the peak of a training step", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("")
    for name in results:
        table.add_column(f"{name}\n[dim]{titles[name]}[/]", justify="right")
    for category in reversed(STACK):
        row = [result.by_category.get(category, 0) for result in results.values()]
        if any(nbytes >= MIB / 2 for nbytes in row):
            table.add_row(LABELS[category], *map(_mib, row))
    table.add_section()
    table.add_row("tracked peak", *(_mib(result.peak_bytes) for result in results.values()), style="bold")
    table.add_row("saved", "", *(f"{saved(r, plain):.1%}" for r in list(results.values())[1:]), style="bold green")
    table.add_row("process peak (RSS)", *(_mib(result.peak_rss_bytes) for result in results.values()))
    table.add_row("seconds a step", *(f"{result.step_seconds:.2f}" for result in results.values()))
    return table


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f} MiB" if nbytes >= MIB / 2 else "-"


def _loss_table(results: Mapping[str, Result]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title="Training loss", box=box.SIMPLE_HEAD, title_style="bold")
    for column in ("", "first", "last", "every step"):
        table.add_column(column, justify="right" if column in ("first", "last") else "left")
    every = [loss for result in results.values() for loss in result.losses]
    for name, result in results.items():
        line = sparkline(result.losses, min(every), max(every))
        table.add_row(name, f"{result.losses[0]:.4f}", f"{result.losses[-1]:.4f}", line)
    return table


# -- picture -----------------------------------------------------------------------------------------------------------
def save_figure(path: Path, results: Mapping[str, Result], titles: Mapping[str, str], subtitle: str) -> None:
    """Draw the peaks as stacked bars beside the loss curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.6), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.06)
    bars, losses = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _draw_bars(bars, results, titles)
    _draw_losses(losses, results)
    for axes in (bars, losses):
        axes.tick_params(colors=_MUTED, labelsize=9.5, length=0)
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
    figure.suptitle(
        f"The same LightningModule, three ways   ({subtitle})",
        x=0.012,
        ha="left",
        fontsize=14,
        fontweight="bold",
        color=_INK,
    )
    figure.savefig(path, facecolor="white")


def _draw_bars(axes: Any, results: Mapping[str, Result], titles: Mapping[str, str]) -> None:
    plain, positions = results["plain"], range(len(results))
    base = [0.0] * len(results)
    for category in STACK:
        values = [result.by_category.get(category, 0) / MIB for result in results.values()]
        if max(values) < plain.peak_bytes / MIB / 1000:
            continue
        axes.bar(
            positions,
            values,
            0.58,
            bottom=base,
            color=COLORS[category],
            label=LABELS[category],
            edgecolor="white",
            linewidth=0.8,
        )
        for x, bottom, value in zip(positions, base, values):
            if value > 0.045 * plain.peak_bytes / MIB:
                axes.text(x, bottom + value / 2, f"{value:,.0f}", ha="center", va="center", fontsize=9, color="white")
        base = [b + v for b, v in zip(base, values)]
    for x, result in zip(positions, results.values()):
        text = f"{result.peak_bytes / MIB:,.0f} MiB"
        if result is not plain:
            text += f"\n{-saved(result, plain):.0%}".replace("-", "\N{MINUS SIGN}")
        style = {"ha": "center", "va": "bottom", "linespacing": 1.25, "fontweight": "bold"}
        axes.text(x, base[x] + plain.peak_bytes / MIB * 0.012, text, fontsize=11.5, color=_INK, **style)
    labels = [f"{name}\n{titles[name]}\n{result.step_seconds:.2g} s a step" for name, result in results.items()]
    axes.set_xticks(list(positions), labels)
    axes.set_ylim(0, plain.peak_bytes / MIB * 1.14)
    axes.set_title("Tensor bytes alive at the peak of a step, MiB", loc="left", fontsize=11, color=_MUTED, pad=8)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper right", frameon=False, fontsize=9.5)


def _draw_losses(axes: Any, results: Mapping[str, Result]) -> None:
    for name, result in results.items():
        steps = range(1, len(result.losses) + 1)
        line = {"linestyle": "--", "linewidth": 3.2, "alpha": 0.55} if name == "plain" else {"linewidth": 1.8}
        axes.plot(steps, result.losses, color=LINE_COLORS[name], marker="o", markersize=4, label=name, **line)
    axes.margins(x=0.04, y=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", fontsize=9.5, color=_MUTED)
    axes.set_title("Training loss", loc="left", fontsize=11, color=_MUTED, pad=8)
    axes.legend(frameon=False, fontsize=9.5)
