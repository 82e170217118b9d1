"""A row with Lightning and this package's callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from gpu.bench.meter import Meter
from gpu.bench.models import dataset, random_model
from gpu.bench.rows import Row
from torch.utils.data import DataLoader

import lightning_memsave

__all__ = ["train"]


class Plain(pl.LightningModule):
    """A plain module: it knows nothing of the savers."""

    def __init__(self, row: Row, device: str) -> None:
        super().__init__()
        self.shape, self.learning_rate, self.warmup = row.shape, row.learning_rate, row.warmup
        self.build_on = device

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = random_model(self.shape, self.build_on)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)
        if not self.warmup:
            return optimizer
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


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
    how: dict[str, Any] = {"precision": row.precision}
    if row.plugin is not None:
        name, arguments = row.plugin
        how = {"plugins": [getattr(lightning_memsave, name)(**arguments)]}
    module = Plain(row, device)
    trainer = pl.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=row.clip,
        callbacks=[*savers, MeterCallback(meter)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=scratch,
        **how,
    )
    trainer.fit(module, DataLoader(dataset(row), batch_size=row.batch))
