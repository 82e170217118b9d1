"""Recomputed blocks on two processes: DDP with and without unused parameters, and FSDP2."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_memsave import ActivationCheckpointing, apply
from lightning_memsave.transforms.checkpoint_blocks import recompute_counts


class Counts(pl.Callback):
    """Keeps the recompute counts of the run, which are gone after it."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, int]] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen = {name: (c.calls, c.recomputed) for name, c in recompute_counts(pl_module).items()}


def train(module: Any, savers: list[Any], strategy: Any, **trainer: Any) -> tuple[list[float], list[Tensor], Any]:
    counts = Counts()
    torch.manual_seed(1)
    made = make_trainer(callbacks=[*savers, counts], devices=2, strategy=strategy, **trainer)
    made.fit(module, make_loader(batch_size=4))
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in module.parameters()]
    return module.losses, weights, counts.seen


def assert_equal(plain: Any, recomputed: Any, names: list[str]) -> None:
    assert plain[0] == recomputed[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], recomputed[1]))
    assert list(recomputed[2]) == names
    assert all(calls == again > 0 for calls, again in recomputed[2].values())


class Partly(LitLM):
    """Uses one block twice, and another in every second step only, so that DDP must look for unused parameters."""

    def __init__(self) -> None:
        super().__init__(depth=3, dropout=0.1)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.net.embedding(batch)
        x = self.net.blocks[0](self.net.blocks[0](x))
        if self.global_step % 2:
            x = self.net.blocks[1](x)
        return self.net.head(self.net.norm(self.net.blocks[2](x))).square().mean()


def ddp(rank: int, strategy: str, policy: str) -> Any:
    def module() -> LitLM:
        return LitLM(depth=3, dropout=0.1) if strategy == "ddp" else Partly()

    return train(module(), [], strategy), train(module(), [ActivationCheckpointing(policy=policy)], strategy)


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_ddp_trains_bitwise_equally(ranks, strategy, policy):
    for plain, recomputed in ranks(ddp, strategy, policy):
        assert_equal(plain, recomputed, ["net.blocks.0", "net.blocks.1", "net.blocks.2"])


class Sharded(LitLM):
    """Shards its own blocks, as ModelParallelStrategy asks; ``early`` applies the saver before."""

    def __init__(self, early: list[Any] | None = None) -> None:
        super().__init__(build_in="configure_model", dropout=0.1)
        self.early = early

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        super().configure_model()
        if self.early:
            apply(self, self.early)
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block.up, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def fsdp2(rank: int, policy: str, order: str) -> Any:
    def strategy() -> Any:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    savers = [ActivationCheckpointing(policy=policy)]
    plain = train(Sharded(), [], strategy(), precision="bf16-true")
    early, late = (savers, []) if order == "before" else ([], savers)
    return plain, train(Sharded(early), late, strategy(), precision="bf16-true")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_fsdp2_trains_bitwise_equally_in_either_order(ranks, policy, order):
    for plain, recomputed in ranks(fsdp2, policy, order):
        assert_equal(plain, recomputed, ["net.blocks.0", "net.blocks.1"])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def plain_loop(rank: int) -> Any:
    results = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        module = Normed()
        if recomputed:
            apply(module, [ActivationCheckpointing()])
        parallel = nn.parallel.DistributedDataParallel(module)
        torch.manual_seed(rank)
        for _ in range(2):
            parallel(torch.randn(4, 8)).square().sum().backward()
        results.append([*(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())])
    return results


def test_a_plain_ddp_loop_needs_no_trainer(ranks):
    for plain, recomputed in ranks(plain_loop):
        assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))
