"""Fine-tune a causal language model: an ordinary LightningModule under an ordinary LightningCLI.

Nothing here knows about memory. The savers are added from outside::

    python examples/finetune.py fit --config examples/configs/plain.yaml
    python examples/finetune.py fit --config examples/configs/trio.yaml
    python examples/finetune.py fit --config examples/configs/full.yaml
    python examples/finetune.py fit --config examples/configs/qlora.yaml
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from smollm2 import PACKAGED, load_model, text_rows
from torch import Tensor
from torch.utils.data import DataLoader


class LanguageModel(pl.LightningModule):
    """Full fine-tuning of a causal language model with AdamW.

    Args:
        model: ``smollm2`` (packaged weights), ``tiny`` (random, for tests), a folder or a name on the hub.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, model: str = PACKAGED, learning_rate: float = 2e-5) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = load_model(self.hparams.model)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class TopicsText(pl.LightningDataModule):
    """The documentation of Python's own topics, as packed rows of tokens.

    Args:
        model: The model whose tokenizer to use, as in ``LanguageModel``.
        batch_size: Rows in a batch.
        num_tokens: Tokens in a row.
    """

    def __init__(self, model: str = PACKAGED, batch_size: int = 4, num_tokens: int = 256) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        if not hasattr(self, "rows"):
            self.rows = text_rows(self.hparams.model, self.hparams.num_tokens)
        if len(self.rows) < self.hparams.batch_size:
            raise ValueError(f"batch_size={self.hparams.batch_size} and the text has only {len(self.rows)} rows")

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.rows, batch_size=self.hparams.batch_size, drop_last=True)  # type: ignore[arg-type]


class FinetuneCLI(LightningCLI):
    """LightningCLI that gives the data the model's name."""

    def add_arguments_to_parser(self, parser) -> None:
        parser.link_arguments("model.model", "data.model")


def main(args: list[str] | None = None, run: bool = True) -> FinetuneCLI:
    """Parse the command line and, unless ``run`` is false, do what it says."""
    return FinetuneCLI(LanguageModel, TopicsText, args=args, run=run, save_config_callback=None)


if __name__ == "__main__":
    main()
