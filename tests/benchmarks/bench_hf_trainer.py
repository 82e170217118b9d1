"""Measure SmolLM2-135M on the CPU: ours under Lightning beside HF Trainer, same method, text, batches and allocator.

``make bench`` or ``python tests/benchmarks/bench_hf_trainer.py --help``. Every run is a fresh process with one
thread. The two sides of a pair run at the same time on two cores, so that whatever else the machine does meets both.
Finished runs are kept in a JSON file beside the page and are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGES = HERE.parents[1] / "docs" / "benchmarks"
METHODS = {
    "adamw_8bit": "full, 8-bit AdamW, checkpointing",
    "adafactor": "full, Adafactor, checkpointing",
    "lora": "LoRA r=8 on all linears, checkpointing",
    "qlora": "QLoRA nf4 double quant r=8, checkpointing",
    "split_master": "full, checkpointing; ours: split master weights, gradient release, chunked loss; HF: 8-bit AdamW",
    "lora_chunked": "LoRA as above; ours with chunked loss",
    "lora_bf16_base": "LoRA as above; ours with chunked loss, the frozen base stored in bf16, bf16-mixed",
    "qlora_chunked": "QLoRA as above; ours with chunked loss",
}
ALLOCATORS = {"glibc": None, "tcmalloc": "libtcmalloc_minimal.so.4"}
PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "accelerate")
FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


@dataclass(frozen=True)
class Pair:
    """One method under one allocator; ``tracked`` counts tensor bytes and is not timed."""

    method: str
    allocator: str
    tracked: bool = False
    host_trim: str = ""

    @property
    def key(self) -> str:
        kind = "tracked" if self.tracked else self.allocator
        return f"{self.method}/{kind}" + (f"/trim={self.host_trim}" if self.host_trim else "")


def library(allocator: str) -> str | None:
    """Return the file to preload for an allocator, ``""`` for none, or ``None`` if it is not installed."""
    name = ALLOCATORS[allocator]
    if name is None:
        return ""
    found = [os.path.join(folder, name) for folder in FOLDERS if os.path.exists(os.path.join(folder, name))]
    return found[0] if found else None


def pairs(args: argparse.Namespace) -> Iterator[Pair]:
    """Yield what to measure."""
    for allocator in args.allocators:
        for method in args.methods:
            yield Pair(method, allocator)
    if "glibc" in args.allocators:
        for method in args.methods:
            yield Pair(method, "glibc", host_trim=args.trim)
    for method in args.methods:
        yield Pair(method, "glibc", tracked=True)


def start(side: str, pair: Pair, args: argparse.Namespace) -> subprocess.Popen[str]:
    """Start one side of a pair."""
    job = {
        "side": side,
        "method": pair.method,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "tokens": args.tokens,
        "model": args.model,
        "tracked": pair.tracked,
        "host_trim": pair.host_trim if side == "ours" else "",
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": library(pair.allocator) or ""}
    command = [sys.executable, "-W", "ignore", str(HERE / "_trainer_runs.py"), json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def measure(pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """Run both sides at once and return what each printed."""
    running = {side: start(side, pair, args) for side in ("ours", "hf")}
    found = {}
    for side, process in running.items():
        out, err = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{pair.key} {side} failed:\n{err[-2000:]}")
        found[side] = json.loads(out.splitlines()[-1])
    return found


def row(pair: Pair, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the repetitions."""
    names = ("tracked_peak_bytes",) if pair.tracked else ("peak_rss_bytes", "step_seconds")
    sides = {
        side: {name: statistics.median(run[side][name] for run in runs) for name in names}
        | {"losses": runs[0][side]["losses"]}
        for side in ("ours", "hf")
    }
    ratios = [run["ours"].get("step_seconds", 1) / run["hf"].get("step_seconds", 1) for run in runs]
    return {**sides, "repetitions": len(runs), "step_ratio": statistics.median(ratios)}


def machine() -> dict[str, str]:
    """Return hardware, versions and commit."""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    libc = " ".join(platform.libc_ver())
    return {
        "cpu": f"{cpu or platform.processor()}, {os.cpu_count()} cores, one thread a process",
        "versions": ", ".join([f"Python {platform.python_version()}", libc, *(f"{p} {version(p)}" for p in PACKAGES)]),
        "commit": commit.stdout.strip(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def page(done: dict[str, Any], args: argparse.Namespace) -> str:
    """Return the page of all rows."""
    command = "python tests/benchmarks/bench_hf_trainer.py " + " ".join(args.argv)
    lines = [
        "# SmolLM2-135M on the CPU, beside HF Trainer",
        "",
        f"fp32, batch {args.batch_size} x {args.tokens} tokens, {args.steps} steps on the text of Python's own "
        "documentation; the same weights, text, batches, learning rate and process allocator on both sides. Ours is an "
        "unedited LightningModule with the callbacks of the method, `ActivationCheckpointing` and `EarlyZeroGrad`. "
        "Peak RSS is that of the process from the start of training on; step time is the median without the first "
        "step, and its ratio that of runs side by side.",
        "",
        *(f"- {name}: {value}" for name, value in machine().items()),
        f"- command: `{command.strip()}`",
        "",
        "## Process peak RSS and step time",
        "",
        "| Method | Allocator | runs | ours MB | HF MB | ratio | ours s | HF s | ratio | losses ours | losses HF |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in pairs(args):
        entry = done.get(pair.key)
        if entry and not pair.tracked:
            lines.append(_timed(pair, row(pair, entry["runs"])))
    lines += ["", "## Tensor bytes alive at the peak of a step", ""]
    lines += ["| Method | ours MB | HF MB | ratio |", "| --- | --- | --- | --- |"]
    for pair in pairs(args):
        entry = done.get(pair.key)
        if entry and pair.tracked:
            ours, theirs = (row(pair, entry["runs"])[side]["tracked_peak_bytes"] / 1e6 for side in ("ours", "hf"))
            lines.append(f"| {METHODS[pair.method]} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |")
    return "\n".join(lines) + "\n"


def _timed(pair: Pair, found: dict[str, Any]) -> str:
    ours, theirs = found["ours"], found["hf"]
    memory = ours["peak_rss_bytes"] / 1e6, theirs["peak_rss_bytes"] / 1e6
    allocator = pair.allocator
    if pair.host_trim:
        allocator += f'; ours with `AllocatorSettings(host_trim="{pair.host_trim}")`'
    losses = [", ".join(f"{loss:.4f}" for loss in side["losses"]) for side in (ours, theirs)]
    return (
        f"| {METHODS[pair.method]} | {allocator} | {found['repetitions']} | "
        f"{memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.2f} | "
        f"{ours['step_seconds']:.1f} | {theirs['step_seconds']:.1f} | {found['step_ratio']:.2f} | "
        f"{losses[0]} | {losses[1]} |"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--trim", default="1GiB", help="growth at which the rows that trim glibc's heap do so")
    parser.add_argument("--output", type=Path, default=PAGES / "smollm2-135m_cpu_202611.json")
    args = parser.parse_args(argv)
    args.argv = argv
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    done: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    missing = [name for name in args.allocators if library(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}. Debian: apt-get install libtcmalloc-minimal4")
    for repetition in range(args.repetitions):
        for pair in pairs(args):
            entry = done.setdefault(pair.key, {"runs": []})
            if len(entry["runs"]) > repetition or (pair.tracked and entry["runs"]):
                continue
            print(f"{pair.key}, repetition {repetition + 1}", flush=True)
            entry["runs"].append(measure(pair, args))
            args.output.write_text(json.dumps(done, indent=1) + "\n")
            args.output.with_suffix(".md").write_text(page(done, args))


if __name__ == "__main__":
    main(sys.argv[1:])
