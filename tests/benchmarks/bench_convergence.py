"""Fine-tune SmolLM2-135M with every optimizer beside fp32 AdamW: same weights, text, batches and schedule.

``make bench-convergence`` or ``python tests/benchmarks/bench_convergence.py --help``. Every run is a fresh process
with one thread. Finished runs are kept in a JSON file beside the page and are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _convergence import REFERENCE, Job, recipes
from bench_hf_trainer import PAGES, machine

HERE = Path(__file__).resolve().parent


def measure(job: Job) -> dict[str, Any]:
    """Run one job in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "_convergence.py"), json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise SystemExit(f"{job.recipe} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def worst(losses: list[float], reference: list[float]) -> float:
    """Return the largest distance of two loss curves, each the mean of five steps so that one batch does not decide."""
    smooth = [[sum(x[i : i + 5]) / 5 for i in range(len(x) - 4)] for x in (losses, reference)]
    return max((abs(a - b) for a, b in zip(*smooth)), default=0.0)


def page(done: dict[str, Any], args: argparse.Namespace, picture: str) -> str:
    """Return the page of all runs."""
    reference = done[REFERENCE]
    marks = sorted({0, *(args.steps * i // 4 - 1 for i in (1, 2, 3, 4))})
    head = ["Optimizer", "learning rate", *(f"step {i + 1}" for i in marks), "held-out loss", "worst distance"]
    lines = [
        "# Every optimizer on SmolLM2-135M, beside fp32 AdamW",
        "",
        f"Full fine-tuning, batch {args.batch_size} x {args.tokens} tokens, {args.steps} steps with warm-up and cosine "
        f"on the text of Python's own documentation; the same weights, batches and schedule in every run. AdamW's "
        f"learning rate is {args.learning_rate:g}; rules that are not AdamW's take the multiple of it that is in the "
        "table. Losses at a step are those of one batch. The held-out loss is the mean over eight rows after the last "
        "step; the worst distance is that of the two curves, each smoothed over five steps.",
        "",
        *(f"- {name}: {value}" for name, value in machine().items()),
        f"- command: `{' '.join(['python tests/benchmarks/bench_convergence.py', *args.argv])}`",
        "",
        f"![Loss curves]({picture})",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for name, recipe in recipes().items():
        if name in done:
            run = done[name]
            cells = [name, f"{recipe.rate:g}x", *(f"{run['losses'][i]:.3f}" for i in marks)]
            cells += [f"{run['held_out_loss']:.4f}", f"{worst(run['losses'], reference['losses']):.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(done: dict[str, Any], path: Path) -> None:
    """Draw every curve over the reference, one small panel a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in done if name != REFERENCE]
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(14, 2.4 * rows), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names):
        axis.plot(done[REFERENCE]["losses"], color="#9aa3ad", linewidth=2.5, label=REFERENCE)
        axis.plot(done[name]["losses"], color="#d6506a", linewidth=1.2, label=name)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].legend([REFERENCE, "this run"], fontsize=8)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def parse(argv: list[str]) -> argparse.Namespace:
    default = Job(recipe=REFERENCE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(recipes()), default=list(recipes()))
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--tokens", type=int, default=default.tokens)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--layers", type=int, default=default.layers, help="keep only the first blocks")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=PAGES / "smollm2-135m-convergence_cpu_202611.json")
    args = parser.parse_args(argv)
    args.argv = argv
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    done: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    settings = {
        key: getattr(args, key) for key in ("steps", "batch_size", "tokens", "learning_rate", "model", "layers")
    }
    jobs = [Job(recipe=name, **settings) for name in {REFERENCE: 0, **dict.fromkeys(args.recipes)} if name not in done]
    picture = args.output.with_suffix(".png")
    with ThreadPoolExecutor(args.processes) as pool:
        for job, found in zip(jobs, pool.map(measure, jobs)):
            done[job.recipe] = found
            print(f"{job.recipe}: held-out loss {found['held_out_loss']:.4f}, {found['seconds']:.0f} s", flush=True)
            args.output.write_text(json.dumps(done, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(page(done, args, picture.name))
    draw(done, picture)


if __name__ == "__main__":
    main(sys.argv[1:])
