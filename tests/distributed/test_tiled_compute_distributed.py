"""Tiled modules on two processes: DDP and FSDP2 see one gradient for each parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LitLM, ShardedLM, make_loader, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_memsave import ActivationCheckpointing, TiledCompute

# Tiles of a weight's gradient are added in another order: 3.9e-15 is the worst difference of a weight seen.
WEIGHTS = 1e-12


def train(strategy: str, savers: list[Any]) -> tuple[list[float], list[Tensor]]:
    sharded = strategy == "fsdp2"
    module = ShardedLM() if sharded else LitLM().double()
    made = make_trainer(
        callbacks=savers,
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else strategy,
    )
    made.fit(module, make_loader(batch_size=4, num_tokens=33))
    return module.losses, [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in module.parameters()]


def both(rank: int, strategy: str) -> Any:
    tiled = TiledCompute(["*norm*", "*.up", "*.down"], tile_tokens=8)
    return train(strategy, []), train(strategy, [tiled]), train(strategy, [tiled, ActivationCheckpointing()])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_without_tiles(ranks, strategy):
    for plain, *others in ranks(both, strategy):
        for losses, weights in others:
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain[0]), rtol=0, atol=1e-12)
            for expected, found in zip(plain[1], weights):
                torch.testing.assert_close(found, expected, rtol=0, atol=WEIGHTS)
