"""A row with Lightning and this package's callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from gpu.bench.meter import Meter
from gpu.bench.models import SyntheticTokens, random_model
from gpu.bench.rows import Row
from torch.utils.data import DataLoader

import lightning_memsave

__all__ = ["train"]


class CausalLM(pl.LightningModule):
    """A plain module: it knows nothing of the savers."""

    def __init__(self, shape: str, learning_rate: float, device: str) -> None:
        super().__init__()
        self.shape, self.learning_rate, self.build_on = shape, learning_rate, device

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = random_model(self.shape, self.build_on)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


class MeterCallback(pl.Callback):
    """Calls the meter around each step."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_start(self, *args: Any) -> None:
        self.meter.step_begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: dict[str, torch.Tensor], *args: Any) -> None:
        self.meter.step_end()
        self.meter.losses.append(outputs["loss"].item())


def train(row: Row, meter: Meter, device: str, scratch: Path) -> None:
    """Train the row's model for its steps."""
    savers = [getattr(lightning_memsave, name)(**arguments) for name, arguments in row.savers]
    module = CausalLM(row.shape, row.learning_rate, device)
    trainer = pl.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        precision=row.precision,
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=[*savers, MeterCallback(meter)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=scratch,
    )
    trainer.fit(module, DataLoader(SyntheticTokens(row), batch_size=row.batch))
