"""``memsave doctor``: what this machine can use, and which methods work together."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lightning_memsave.cli._checks import Row

__all__ = ["HELP", "add_arguments", "run"]

HELP = """
Show what this machine can use, and which methods work together.

Examples:
  memsave doctor
  memsave doctor --json > machine.json

Exit code: 0 if training can start here, 1 if torch or Lightning is missing or too old.
"""

_STYLES = {"ok": "green", "info": "dim", "warn": "yellow", "missing": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Look at the machine and show what was found."""
    from lightning_memsave.cli._checks import all_rows

    rows, methods = all_rows(), _methods()
    if args.json:
        print(json.dumps({"machine": [asdict(row) for row in rows], "methods": methods}, indent=2))
    else:
        _show(rows, methods)
    return 1 if _blocked(rows) else 0


def _blocked(rows: list[Row]) -> bool:
    """Training cannot start: no usable torch, or no Lightning namespace at all."""
    bad = {row.name for row in rows if row.group == "Software" and row.status in ("missing", "warn")}
    return bool(bad & {"torch", "lightning", "pytorch_lightning"})


def _methods() -> list[dict[str, Any]]:
    """Return, for each method of the catalog, what it lacks here and what it does not run with."""
    from lightning_memsave.cli._checks import missing_for
    from lightning_memsave.planner.catalog import CATALOG
    from lightning_memsave.planner.compatibility import STRATEGIES, cell, partners_refused

    return [
        {
            "name": row.name,
            "missing": missing_for(row.name),
            # a strategy is a column of this table, not a row
            "strategies": {} if row.slot == "strategy" else {kind: cell(row.name, kind) for kind in STRATEGIES},
            "refused_with": partners_refused(row.name),
        }
        for row in CATALOG
    ]


def _show(rows: list[Row], methods: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for group, members in groupby(rows, key=lambda row: row.group):
        _show_group(console, group, list(members))
    _show_methods(console, methods)


def _show_group(console: Console, title: str, rows: list[Row]) -> None:
    from rich.text import Text

    table = _table(title)
    table.show_header = False
    table.add_column(width=7)
    table.add_column(width=18, no_wrap=True)
    table.add_column(min_width=13)
    table.add_column(overflow="fold", style="dim")
    for row in rows:
        table.add_row(Text(row.status, style=_STYLES[row.status]), Text(row.name), Text(row.value), Text(row.note))
    console.print(table)
    console.print()


def _show_methods(console: Console, methods: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from lightning_memsave.planner.compatibility import STRATEGIES

    reasons: list[str] = []
    rows = [method for method in methods if method["strategies"]]
    # As many strategies side by side as fit eighty columns.
    for first in range(0, len(STRATEGIES), _STRATEGIES_IN_A_ROW):
        table = _table("Methods" if first == 0 else "Methods on other strategies", gap=1)
        table.add_column("method", no_wrap=True)
        kinds = STRATEGIES[first : first + _STRATEGIES_IN_A_ROW]
        for title in (*(["here"] if first == 0 else []), *kinds):
            table.add_column(title, no_wrap=True)
        for method in rows:
            missing = "\n".join(method["missing"])
            here = [("no", missing) if missing else ("yes", "")] if first == 0 else []
            entries = [*here, *(method["strategies"][kind] for kind in kinds)]
            table.add_row(method["name"], *(_cell(status, reason, reasons) for status, reason in entries))
        console.print(table)
        console.print()
    for number, reason in enumerate(reasons, 1):
        console.print(Text(f"[{number}] {reason}", style="dim"))
    console.print()
    pairs = _table("Not together")
    pairs.show_header = False
    pairs.add_column(no_wrap=True)
    pairs.add_column(overflow="fold", style="dim")
    for method in methods:
        for other, reason in method["refused_with"].items():
            if method["name"] < other:
                pairs.add_row(f"{method['name']}, {other}", Text(reason))
    console.print(pairs)


def _table(title: str, gap: int = 2) -> Table:
    from rich.table import Table

    return Table(
        box=None, padding=(0, gap, 0, 0), title=title, title_style="bold", title_justify="left", header_style="dim"
    )


_STRATEGIES_IN_A_ROW = 4
_CELLS = {"yes": "green", "partly": "yellow", "no": "red", "untested": "dim"}


def _cell(status: str, reason: str, reasons: list[str]) -> Text:
    from rich.text import Text

    if status in ("yes", "untested"):
        return Text(status, style=_CELLS[status])
    if reason not in reasons:
        reasons.append(reason)
    return Text(f"{status}[{reasons.index(reason) + 1}]", style=_CELLS[status])
