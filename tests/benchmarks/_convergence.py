"""One fine-tuning run for the convergence page: real weights, real text, one optimizer, everything else equal.

``python _convergence.py '{"recipe": "adamw_8bit", ...}'`` prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import lightning.pytorch as pl
import torch
from smollm2 import PACKAGED, load_model, text_rows
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_memsave.optim.registry import OPTIMIZERS

__all__ = ["REFERENCE", "Job", "recipes", "run"]

REFERENCE = "fp32 AdamW"
HELD_OUT_ROWS = 8
# Update rules that are not AdamW's step by another size at the same rate; the multiple of AdamW's rate they are given.
RATES = {"adalomo": 10.0, "came": 0.2, "galore_adamw": 4.0, "lion": 0.3, "lion_8bit": 0.3, "muon": 10.0}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run.

    Args:
        recipe: One of ``recipes()``.
        steps: Optimizer steps; the first tenth warms up linearly, then the rate follows a cosine to a tenth.
        batch_size: Rows in a batch.
        tokens: Tokens in a row.
        learning_rate: AdamW's; other rules take their multiple of it.
        model: Which model, as in ``examples/smollm2.py``.
        layers: Keep only the first blocks; 0 keeps all.
        threads: CPU threads.

    """

    recipe: str
    steps: int = 60
    batch_size: int = 4
    tokens: int = 128
    learning_rate: float = 5e-5
    model: str = PACKAGED
    layers: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Recipe:
    """What is given to the Trainer."""

    rate: float = 1.0
    trainer: Callable[[], dict[str, Any]] = field(default=dict)


def recipes() -> dict[str, Recipe]:
    """Return every optimizer of the package, and every way to hold bf16 weights, by name."""
    from lightning_memsave import BF16Precision, GradientRelease, LowMemoryOptimizer

    found = {REFERENCE: Recipe()}
    for name in OPTIMIZERS:
        if name == "adamw_split_master":
            continue
        found[name] = Recipe(RATES.get(name, 1.0), lambda name=name: {"callbacks": [LowMemoryOptimizer(name)]})
    found["bf16-true, AdamW"] = Recipe(1.0, lambda: {"precision": "bf16-true"})
    for weights in ("stochastic", "kahan", "split"):
        found[f"bf16 {weights}, AdamW"] = Recipe(1.0, lambda w=weights: {"plugins": [BF16Precision(w)]})
    found["bf16 split, adamw_split_master, gradient release"] = Recipe(
        1.0,
        lambda: {
            "plugins": [BF16Precision("split")],
            "callbacks": [LowMemoryOptimizer("adamw_split_master"), GradientRelease()],
        },
    )
    return found


class Finetune(pl.LightningModule):
    """An ordinary language-model fine-tune with warm-up and a cosine."""

    def __init__(self, job: Job, rate: float) -> None:
        super().__init__()
        self.job, self.rate = job, rate
        self.net = load_model(job.model)
        if job.layers:
            del self.net.model.layers[job.layers :]
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(input_ids=batch, labels=batch, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.job.learning_rate * self.rate, weight_decay=0.01)
        warmup = max(1, self.job.steps // 10)

        def factor(step: int) -> float:
            done = min(1.0, max(0, step - warmup) / max(1, self.job.steps - warmup))
            return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(job: Job) -> dict[str, Any]:
    """Train and return the loss of every step and of rows that were held out."""
    recipe = recipes()[job.recipe]
    torch.manual_seed(0)
    rows = text_rows(job.model, job.tokens)
    train, held_out = rows[:-HELD_OUT_ROWS], rows[-HELD_OUT_ROWS:]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    module = Finetune(job, recipe.rate)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=job.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **recipe.trainer(),
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train[order], batch_size=job.batch_size, drop_last=True))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    module.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        losses = [module.net(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in held_out]
    return {
        "losses": [round(loss, 4) for loss in module.losses],
        "held_out_loss": round(sum(losses) / len(losses), 4),
        "seconds": round(seconds, 1),
    }


def main(text: str) -> None:
    job = Job(**json.loads(text))
    torch.set_num_threads(job.threads)
    print(json.dumps(run(job)))


if __name__ == "__main__":
    main(sys.argv[1])
