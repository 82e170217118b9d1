"""Measure on a GPU what has not been measured yet, for at most nine minutes; run it again to go on.

    make bench-gpu                                              # or, in an environment of your own:
    python tests/gpu/bench/bench_suite.py --list
    python tests/gpu/bench/bench_suite.py --only '*/qlora/*'
    python tests/gpu/bench/bench_suite.py --results out.jsonl   # on a machine that is not this one, then here:
    python tests/gpu/bench/bench_suite.py --merge out.jsonl

Each row runs in a process of its own. A row that is already in the results for this hardware, package version and
torch version is left out. Nothing is downloaded: models have real shapes and random weights.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
for _folder in (str(ROOT), str(ROOT / "tests")):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

from gpu.bench.machine import commit, measured_on  # noqa: E402
from gpu.bench.page import update_page  # noqa: E402
from gpu.bench.results import Results  # noqa: E402
from gpu.bench.rows import ROWS, Row  # noqa: E402

BUDGET_SECONDS = 540.0
RESERVE_SECONDS = 10.0  # to stop a process and write what is known before the budget ends
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The rows still to measure on one machine.

    Args:
        results: Where results are kept.
        about: ``measured_on(device)``.
        device: ``cuda`` or ``cpu``.
        command: The command that was typed.
        commit: Of the measured code.
        clock: Seconds; replaced in tests.

    """

    results: Results
    about: Record
    device: str
    command: str
    commit: str
    clock: Callable[[], float] = time.monotonic

    def describe(self, row: Row) -> Record:
        """Return everything about a result that is known before it is measured."""
        return {
            "row": row.name,
            "revision": row.revision,
            "shape": row.shape,
            "method": row.method,
            "framework": row.framework,
            "batch": row.batch,
            "tokens": row.tokens,
            "precision": row.precision_text,
            "savers": row.savers_text,
            "learning_rate": row.learning_rate,
            "commit": self.commit,
            "command": self.command,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            **self.about,
        }

    def todo(self, pattern: str | None) -> list[Row]:
        """Return the rows to measure here, in their order: tiny ones on a processor, the others on a GPU."""
        chosen = []
        for row in ROWS:
            fits = (
                row.shape.startswith("tiny") == (self.device == "cpu")
                if pattern is None
                else fnmatchcase(row.name, pattern)
            )
            if fits and self.results.find(self.describe(row)) is None:
                chosen.append(row)
        return chosen

    def run(self, rows: Sequence[Row], budget: float, measure: Callable[[Row, float], Record]) -> tuple[int, list[Row]]:
        """Measure rows while their estimates fit into the budget.

        Returns:
            How many processes failed, and the rows that are left.

        """
        end, failures, left = self.clock() + budget, 0, []
        for row in rows:
            time_left = end - self.clock() - RESERVE_SECONDS
            if time_left < row.estimate_seconds:
                left.append(row)
                continue
            print(f"[bench] {row.name} ({time_left:.0f} s left)", flush=True)
            result = measure(row, time_left)
            if result["status"] == "timeout" and time_left < budget - 2 * RESERVE_SECONDS:
                print(f"[bench] {row.name}: stopped after {time_left:.0f} s; it goes first into a slice of its own")
                left.insert(0, row)
            elif result["status"] == "failed":
                failures += 1
                left.append(row)
            else:
                self.results.append({**self.describe(row), **result})
                print(f"[bench] {row.name}: {summary(result)}", flush=True)
        return failures, left


def summary(result: Record) -> str:
    """Return one line about a result."""
    parts = [result["status"]]
    if "peak_allocated_bytes" in result:
        parts.append(f"peak {result['peak_allocated_bytes'] / 2**30:.2f} GiB allocated")
        parts.append(f"{result['peak_reserved_bytes'] / 2**30:.2f} GiB reserved")
    if "step_seconds" in result:
        parts.append(f"{result['step_seconds']:.3f} s a step, {result['tokens_per_second']:,.0f} tokens/s")
    if result.get("losses"):
        parts.append(f"loss {result['losses'][0]:.3f} to {result['losses'][-1]:.3f}")
    return ", ".join(parts)


def run_process(command: Sequence[str], limit_seconds: float) -> int | None:
    """Run a command in a process group of its own and return its exit status, or ``None`` if it was stopped."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # HF Trainer would spread over all devices it sees
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measure_in_process(device: str, scratch: Path) -> Callable[[Row, float], Record]:
    """Return a function that measures one row in a fresh process."""

    def measure(row: Row, limit_seconds: float) -> Record:
        import json

        output = scratch / "result.json"
        output.unlink(missing_ok=True)
        code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}; from gpu.bench.worker import main; "
        arguments = (row.name, device, str(scratch), str(output))
        status = run_process([sys.executable, "-c", f"{code}sys.exit(main(*{arguments!r}))"], limit_seconds)
        if status is None:
            return {"status": "timeout", "limit_seconds": round(limit_seconds)}
        if status == -signal.SIGKILL:  # the system's own: the host has no memory left
            return {"status": "oom", "error": "the process was killed: the host ran out of memory"}
        if status != 0 or not output.exists():
            print(f"[bench] {row.name}: failed with exit status {status}; it stays to be measured", flush=True)
            return {"status": "failed"}
        return dict(json.loads(output.read_text()))

    return measure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds of one slice")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only the tiny rows")
    parser.add_argument("--only", help="a glob over row names, e.g. '*/qlora/*'")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/benchmarks/gpu.jsonl", help="results, JSON lines")
    parser.add_argument("--page", type=Path, help="the Markdown page; docs/benchmarks/gpu.md for the default results")
    parser.add_argument("--scratch", type=Path, help="folder for model files, kept; a temporary one by default")
    parser.add_argument("--commit", help="commit of the measured code, where there is no git; found by default")
    parser.add_argument("--merge", type=Path, help="only add the rows of this file to the results")
    parser.add_argument("--list", action="store_true", help="only show the rows and whether they are measured")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one slice and return the exit status: 0, 1 (a process failed) or 2 (no such device or row)."""
    options = parse(arguments)
    results = Results(options.results)
    default = options.results == ROOT / "docs/benchmarks/gpu.jsonl"
    page = options.page or (ROOT / "docs/benchmarks/gpu.md" if default else options.results.with_suffix(".md"))
    if options.merge is not None:
        print(f"[bench] {results.merge(Results(options.merge).records())} new rows in {results.path}")
        update_page(page, results.records())
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("[bench] torch sees no CUDA device here, so nothing was measured (--device cpu runs the tiny rows).")
        return 2
    if options.only is not None and not any(fnmatchcase(row.name, options.only) for row in ROWS):
        print(f"[bench] --only {options.only!r} matches no row. Rows:", *(row.name for row in ROWS), sep="\n  ")
        return 2
    typed = [Path(sys.argv[0]).name if arguments is None else "bench_suite.py", *(arguments or sys.argv[1:])]
    suite = Suite(
        results=results,
        about=measured_on(options.device),
        device=options.device,
        command=shlex.join(["python", "tests/gpu/bench/bench_suite.py", *typed[1:]]),
        commit=options.commit or commit(),
    )
    rows = suite.todo(options.only)
    if options.list:
        for row in ROWS:
            print(f"{'to measure' if row in rows else '-':<12}{row.name}")
        return 0
    with tempfile.TemporaryDirectory(prefix="memsave-bench-") as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        failures, left = suite.run(rows, options.budget, measure_in_process(options.device, scratch))
    if results.records():
        update_page(page, results.records())
    for row in left:
        print(f"[bench] left: {row.name} (about {row.estimate_seconds} s)")
    print(f"[bench] {len(rows) - len(left)} rows measured, {len(left)} left; results in {results.path}, {page}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
