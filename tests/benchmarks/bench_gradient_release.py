"""Time a step of AdamW inside backward beside the plain step, and compare the peaks of both.

Run from the repository root::

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_gradient_release.py      # 29.4 million parameters, 2 minutes

Both runs are in one process and take turns, so that whatever else the machine does hits both alike. Time is processor
time of one thread; what is printed is the median over all pairs of neighbouring steps, and the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_memsave.memory.tracker import track_memory
from lightning_memsave.optim.release import Clipping, GradientReleaser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import TinyLM

Step = Callable[[], None]


def build(
    clip: str | None, *, released: bool, width: int, depth: int, tokens: int
) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """Return a model, its optimizer and a function that trains on one batch."""
    torch.manual_seed(0)
    net = TinyLM(vocabulary=8192, width=width, depth=depth, tied=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    ids = torch.randint(0, 8192, (4, tokens + 1))
    release = GradientReleaser(optimizer) if released else None
    clipping = Clipping(limit=1.0, kind="two_pass") if clip else None

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def step() -> None:
        value = loss()
        if release is not None:
            release.backward(value, clip=clipping)
        else:
            optimizer.zero_grad()  # after the forward, as Lightning does
            value.backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return net, optimizer, step


def seconds(step: Step) -> float:
    """Return the processor time of a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def peak(net: nn.Module, optimizer: torch.optim.Optimizer, step: Step) -> int:
    """Return the bytes alive at the peak of a step."""
    with track_memory(net, optimizers=[optimizer]) as tracker:
        step()
    return tracker.measurement().peak_bytes


def main() -> None:
    """Print one line a way of clipping."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for clip in (None, "two_pass"):
        sizes = {"width": options.width, "depth": options.depth, "tokens": options.tokens}
        *plain_model, plain = build(clip, released=False, **sizes)
        *released_model, released = build(clip, released=True, **sizes)
        for step in (plain, released):
            step()
        ratios, times = [], []
        for turn in range(options.pairs):
            first, second = (plain, released) if turn % 2 else (released, plain)
            pair = [seconds(first), seconds(second)]
            mine, theirs = pair if first is released else pair[::-1]
            ratios.append(mine / theirs)
            times.append((theirs, mine))
        low, middle, high = statistics.quantiles(ratios, n=4)
        count = sum(p.numel() for p in plain_model[0].parameters())
        print(
            f"{count / 1e6:.1f}M parameters, clip={clip}: step {statistics.median(t for t, _ in times):.3f} -> "
            f"{statistics.median(t for _, t in times):.3f} s, ratio {middle:.3f} ({low:.3f} to {high:.3f}); peak "
            f"{peak(*plain_model, plain) / 2**20:.0f} -> {peak(*released_model, released) / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
