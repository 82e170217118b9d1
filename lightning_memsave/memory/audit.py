"""What the first training step shows about a run: findings, their table and their file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_memsave._imports import require

__all__ = ["AuditReport", "Finding", "Status", "listed"]

Status = Literal["ok", "warning", "problem"]
_FORMAT = "lightning-memsave-audit-1"
_COLORS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """One line of the audit.

    Args:
        check: What was looked at, e.g. ``"gradients"``.
        status: ``ok``; ``warning`` costs memory or may not be meant; ``problem`` means that something asked for does
            not happen.
        text: What was found, and what to write instead.
        names: All qualified names concerned; the text shows the first few.

    """

    check: str
    status: Status
    text: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditReport:
    """The findings of one audit.

    Args:
        findings: One for each line of the table.
        batches: How many batches were looked at.
        lines: What each method reported before the first step, as ``(method, line)``.

    """

    findings: Sequence[Finding]
    batches: int
    lines: Sequence[tuple[str, str]] = field(default_factory=tuple)

    @property
    def problems(self) -> list[Finding]:
        """The findings that say that something asked for does not happen."""
        return [finding for finding in self.findings if finding.status == "problem"]

    def table(self, width: int = 120) -> str:
        """Return the findings as text, one row each.

        Args:
            width: Columns of text.

        """
        console_module, table_module = require("rich.console", "MemoryAudit"), require("rich.table", "MemoryAudit")
        text, box = require("rich.text", "MemoryAudit").Text, require("rich.box", "MemoryAudit")
        stream = io.StringIO()
        console = console_module.Console(file=stream, width=width)
        made = table_module.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("check", "", "found"):
            made.add_column(column, overflow="fold")
        for finding in self.findings:
            status = text(finding.status, style=_COLORS[finding.status])
            made.add_row(text(finding.check), status, text(finding.text))
        batches = "batch" if self.batches == 1 else f"{self.batches} batches"
        console.print(text(f"Audit of the first {batches}", style="bold"))
        console.print(made)
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def to_json(self, path: str | Path) -> Path:
        """Write every finding with all its names."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = {"format": _FORMAT, **asdict(self)}
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")
        return path


def listed(names: Iterable[str]) -> str:
    """Return the first few names and how many more there are.

    Example:
        >>> listed("abcdef")
        'a, b, c, d and 2 more'

    """
    every = list(names)
    rest = len(every) - _NAMES_SHOWN
    return ", ".join(every[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
