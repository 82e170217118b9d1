"""Fine-tune a real language model plainly, then with the savers, and show what each saved.

One unmodified LightningModule (``finetune.LanguageModel``), three runs, each in its own process:

* ``plain``: fp32 weights, AdamW, nothing of ours but the profiler.
* ``trio``: bf16 autocast, activation checkpointing and 8-bit AdamW: full fine-tuning, the same update rule.
* ``qlora``: 4-bit frozen weights with trained low-rank adapters.

``make demo`` runs it. It needs no download, no GPU and less than 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smollm2 import PACKAGED

# The first step has no optimizer state yet and the second is the first full one; the others run unprofiled and timed.
PROFILED_STEPS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the three runs.

    Args:
        title: What it is, for people.
        precision: The Trainer's own ``precision``.
        learning_rate: Of the module's AdamW; adapters start from zero and take a larger one.
        savers: Makes the callbacks: the same lines a user adds to a Trainer.

    """

    title: str
    precision: str
    learning_rate: float
    savers: Callable[[], list[Any]]


def _trio() -> list[Any]:
    from lightning_memsave import ActivationCheckpointing, EarlyZeroGrad, LowMemoryOptimizer

    return [ActivationCheckpointing(), LowMemoryOptimizer("adamw_8bit"), EarlyZeroGrad()]


def _qlora() -> list[Any]:
    from lightning_memsave import ActivationCheckpointing, EarlyZeroGrad, QLoRA

    return [QLoRA(rank=16), ActivationCheckpointing(), EarlyZeroGrad()]


RUNS = {
    "plain": Run(title="fp32, AdamW", precision="32-true", learning_rate=2e-5, savers=list),
    "trio": Run(title="bf16 + checkpointing + 8-bit AdamW", precision="bf16-mixed", learning_rate=2e-5, savers=_trio),
    "qlora": Run(title="QLoRA + checkpointing", precision="bf16-mixed", learning_rate=2e-4, savers=_qlora),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The numbers of one run.

    Args:
        peak_bytes: Most bytes alive in tensors at one moment of a profiled step.
        by_category: The same moment, split by what the tensors are for.
        peak_rss_bytes: Most memory the whole process ever held, libraries and allocator included.
        step_seconds: Median of the steps that were not profiled.
        losses: The training loss of every step.
        allocator: The process's memory allocator.

    """

    peak_bytes: int
    by_category: dict[str, int]
    peak_rss_bytes: int
    step_seconds: float
    losses: list[float]
    allocator: str


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED, help="smollm2 (packaged), tiny (random), a folder or a hub name")
    parser.add_argument("--steps", type=int, default=8, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows in a batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results (default: demo)")
    parser.add_argument("--run", choices=list(RUNS), help="only this run, in this process (used by the demo itself)")
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.tokens) < 1:
        parser.error("--batch-size and --tokens must be positive")
    if options.steps <= len(PROFILED_STEPS):
        parser.error(
            f"--steps must be at least {len(PROFILED_STEPS) + 1}: the first {len(PROFILED_STEPS)} are profiled"
        )
    return options


def train(name: str, options: argparse.Namespace) -> Result:
    """Do one run in this process; every finished step is one JSON line on stdout."""
    import lightning.pytorch as pl
    from finetune import LanguageModel, TopicsText

    from lightning_memsave import MemoryProfiler, last_report

    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.seconds: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            self.losses.append(outputs["loss"].item())
            print(json.dumps({"step": len(self.losses), "loss": self.losses[-1]}), flush=True)

    run, steps = RUNS[name], Steps()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=run.precision,
        max_steps=options.steps,
        callbacks=[*run.savers(), MemoryProfiler(steps=PROFILED_STEPS), steps],
        default_root_dir=options.output / name,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        LanguageModel(options.model, learning_rate=run.learning_rate),
        TopicsText(options.model, batch_size=options.batch_size, num_tokens=options.tokens),
    )
    report = last_report()
    assert report is not None
    return Result(
        peak_bytes=report.peak_bytes,
        by_category=report.by_category,
        peak_rss_bytes=report.host_peak_bytes,
        step_seconds=statistics.median(steps.seconds[max(PROFILED_STEPS) :]),
        losses=steps.losses,
        allocator=report.host_allocator or "unknown",
    )


def train_all(options: argparse.Namespace) -> dict[str, Result]:
    """Do every run in a process of its own, so that its peak resident set is its own, under one progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    results = {}
    columns = [
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TextColumn("{task.fields[state]:<24}"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns) as progress:
        for name, run in RUNS.items():
            task = progress.add_task(run.title, total=options.steps, state="loading")
            folder = options.output / name
            folder.mkdir(parents=True, exist_ok=True)
            arguments = [
                f"--run={name}",
                *(f"--{k.replace('_', '-')}={v}" for k, v in vars(options).items() if k != "run"),
            ]
            with (
                (folder / "log.txt").open("w") as log,
                subprocess.Popen(
                    [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=log, text=True
                ) as process,
            ):
                for line in process.stdout or ():
                    if line.startswith('{"step"'):
                        said = json.loads(line)
                        state = f"step {said['step']}, loss {said['loss']:.4f}"
                        progress.update(task, completed=said["step"], state=state)
                    else:
                        log.write(line)
            if process.returncode:
                raise SystemExit(f"the run {name!r} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
            results[name] = Result(**json.loads((folder / "result.json").read_text()))
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.run:
        result = train(options.run, options)
        (options.output / options.run / "result.json").write_text(json.dumps(asdict(result)))
        return 0
    from quickstart_report import print_results, save_figure

    start = time.perf_counter()
    results = train_all(options)
    titles = {name: run.title for name, run in RUNS.items()}
    (options.output / "results.json").write_text(
        json.dumps({k: asdict(v) for k, v in results.items()}, indent=2) + "\n"
    )
    subtitle = f"{options.model}, {options.batch_size} x {options.tokens} tokens, CPU"
    save_figure(options.output / "memory.png", results, titles, subtitle)
    print_results(results, titles, options.output, time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
