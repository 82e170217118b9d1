"""The measured rows: a file of JSON lines that only ever grows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["IDENTITY", "Results"]

Record = dict[str, Any]

# Two results with these equal are the same measurement.
IDENTITY = ("row", "revision", "hardware", "package_version", "torch_version")


def identity(record: Record) -> tuple[Any, ...]:
    """Return what makes a result one of its own."""
    return tuple(record[key] for key in IDENTITY)


class Results:
    """Results in a JSON-lines file; a row is appended, never replaced.

    Args:
        path: The file; it need not exist yet.

    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[Record]:
        """Return all results in the order in which they were measured."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def find(self, wanted: Record) -> Record | None:
        """Return the result with the same identity, or ``None``."""
        return next((r for r in self.records() if identity(r) == identity(wanted)), None)

    def append(self, record: Record) -> None:
        """Add one result.

        Raises:
            ValueError: If this row was already measured on this hardware with these versions, or one from the future
                of this file (a key of the identity) is missing.

        """
        missing = [key for key in IDENTITY if key not in record]
        if missing:
            raise ValueError(f"a result needs {', '.join(missing)}")
        if self.find(record) is not None:
            raise ValueError(f"{identity(record)} is already in {self.path}; a row is never overwritten")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def merge(self, records: Iterable[Record]) -> int:
        """Append the results that are not here yet, e.g. of a file brought back from another machine.

        Returns:
            How many were new.

        """
        new = [r for r in records if self.find(r) is None]
        for record in new:
            self.append(record)
        return len(new)
