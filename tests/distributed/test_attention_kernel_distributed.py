"""Attention kernels on two processes: gradients are those of the math kernel under DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_memsave import ActivationCheckpointing, AttentionKernel

# Flash and math kernel in fp64: 2.4e-13 is the worst difference of a weight seen after three steps of AdamW.
TOLERANCE = 1e-10


class Block(nn.Module):
    """Attention with a causal mask and repeated heads, as much code calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (p(x).view(batch, tokens, -1, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        a = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask)
        return x + a.transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Lit(LitLM):
    def _build(self) -> None:
        torch.manual_seed(0)
        self.net = Net()

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        super().configure_model()
        self.net.double()
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def train(strategy: str, savers: list[Any]) -> tuple[list[float], list[Tensor], list[str]]:
    sharded = strategy == "fsdp2"
    module = Lit(build_in="configure_model") if sharded else Lit().double()
    made = make_trainer(
        callbacks=savers,
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else strategy,
    )
    made.fit(module, make_loader(batch_size=4))
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in module.parameters()]
    return module.losses, weights, [line for _, line in made._memsave.lines]


def both(rank: int, strategy: str) -> Any:
    attention = AttentionKernel()
    return (
        train(strategy, [AttentionKernel("math")]),
        train(strategy, [attention]),
        train(strategy, [attention, ActivationCheckpointing(["Block"])]),
    )


@pytest.mark.parametrize("strategy", ["ddp", "memsave_ddp", "fsdp2"])
def test_two_processes_train_as_with_the_math_kernel(ranks, strategy):
    for plain, *others in ranks(both, strategy):
        assert not any("replaced" in line for line in plain[2])
        for losses, weights, lines in others:
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain[0]), rtol=0, atol=TOLERANCE)
            for expected, found in zip(plain[1], weights):
                torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
            text = " ".join(lines)
            assert "Block (net.blocks.0, net.blocks.1), float64, head_dim 8, causal" in text
            assert "causal masks replaced by is_causal=True" in text
            assert "repeated key and value heads shared" in text
