"""Small modules and Trainers shared by the tests (random weights, under one MB)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset


class Tokens(Dataset):
    """``(T,)`` int64 rows of random token ids, the same every time."""

    def __init__(self, num_rows: int = 24, num_tokens: int = 16, vocabulary: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (num_rows, num_tokens), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = 64, num_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            p(y).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.o_proj(a.transpose(1, 2).reshape(batch, tokens, width))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class TinyLM(nn.Module):
    """Embedding, blocks, head: ``(B, T)`` int64 -> ``(B, T, vocabulary)``."""

    def __init__(
        self, vocabulary: int = 64, width: int = 64, depth: int = 2, dropout: float = 0.0, tied: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LitLM(pl.LightningModule):
    """A plain language-model LightningModule; ``build_in`` chooses where the network is made."""

    def __init__(self, build_in: str = "init", lr: float = 1e-3, **network: Any) -> None:
        super().__init__()
        self.build_in, self.lr, self.network = build_in, lr, network
        self.losses: list[float] = []
        if build_in == "init":
            self._build()

    def _build(self) -> None:
        torch.manual_seed(0)
        self.net = TinyLM(**self.network)

    def setup(self, stage: str) -> None:
        if self.build_in == "setup" and not hasattr(self, "net"):
            self._build()

    def configure_model(self) -> None:
        if self.build_in == "configure_model" and not hasattr(self, "net"):
            self._build()

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class ShardedLM(LitLM):
    """Shards its own blocks, as ``ModelParallelStrategy`` asks; made in fp64 in ``configure_model``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(build_in="configure_model", **options)

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        super().configure_model()
        self.net.double()
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def make_loader(batch_size: int = 8, **kwargs: Any) -> DataLoader:
    """Three batches an epoch."""
    return DataLoader(Tokens(**kwargs), batch_size=batch_size)


def make_trainer(namespace: Any = pl, **kwargs: Any) -> Any:
    """Return a quiet CPU Trainer: one epoch, no files."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return namespace.Trainer(**{**defaults, **kwargs})
