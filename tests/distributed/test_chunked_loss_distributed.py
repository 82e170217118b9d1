"""ChunkedLoss on two processes: DDP, and FSDP2 with the head in a group of its own, in the root's, or taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_memsave import ChunkedLoss
from lightning_memsave.transforms.chunked_loss import ChunkOptions
from lightning_memsave.transforms.deferred_logits import defer_counts, defer_logits

# Worst seen 4.8e-7 (losses near 4).
TOLERANCE = 2e-6


class ReturnsLogits(LitLM):
    """A training step that returns its logits beside the loss, and a parameter that no loss reaches."""

    def __init__(self, **network: Any) -> None:
        super().__init__(**network)
        self.unused = nn.Parameter(torch.zeros(1))
        self.returned: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.returned.append(float(outputs["logits"].float().logsumexp(-1).mean()))


def _fit(rank: int, strategy: str, chunked: bool, tied: bool) -> tuple[list[float], list[float]]:
    module = ReturnsLogits(tied=tied)
    callbacks = [ChunkedLoss(chunk_tokens=8)] if chunked else []
    limits: dict[str, Any] = {"use_distributed_sampler": False, "limit_train_batches": 3}
    trainer = make_trainer(strategy=strategy, devices=2, callbacks=callbacks, **limits)
    trainer.fit(module, make_loader(batch_size=4 + 4 * rank))
    weights = [float(p.detach().double().sum()) for p in module.parameters()]
    return module.losses[:3] + module.returned[:3], weights


@pytest.mark.parametrize("tied", [False, True])
def test_ddp_trains_as_without_also_where_the_step_returns_logits(tied: bool, ranks: Callable[..., list[Any]]) -> None:
    strategy = "ddp_find_unused_parameters_true"
    for found, expected in zip(ranks(_fit, strategy, True, tied), ranks(_fit, strategy, False, tied)):
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=1e-4, atol=1e-4)


def _shard(module: LitLM, place: str, policy: MixedPrecisionPolicy) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in module.net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if place == "own group":
        fully_shard(module.net.head, mesh=mesh, mp_policy=policy)
    fully_shard(module.net, mesh=mesh, mp_policy=policy, reshard_after_forward=place == "taken away")
    return module.net


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_steps(
    rank: int, place: str, chunked: bool, tied: bool, param_dtype: torch.dtype | None
) -> tuple[list[float], list[Tensor], list[Any]]:
    """Two steps, each with two micro-batches, a validation loss and a look at the accuracy."""
    module = LitLM(tied=tied)
    if chunked:
        defer_logits(module, ChunkOptions(chunk_tokens=8))
    net = _shard(module, place, MixedPrecisionPolicy(param_dtype=param_dtype))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    found = []
    for step in range(2):
        for micro in range(2):
            torch.manual_seed(10 * step + 2 * micro + rank)
            ids = torch.randint(0, 64, (3, 9))
            logits = net(ids[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            found += [loss.item(), float((logits.detach().argmax(-1) == ids[:, 1:]).float().mean())]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found.append(float(net(ids).logsumexp(-1).mean()))
    counts = [(c.losses, dict(c.materialised), dict(c.plain)) for c in defer_counts(module).values()]
    return found, [_whole(p.detach()).clone() for p in net.parameters()], counts


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("place", "tied"), [("own group", False), ("root", False), ("root", True), ("taken away", True)]
)
def test_fsdp2_gives_the_losses_and_weights_of_plain_logits(
    place: str, tied: bool, param_dtype: torch.dtype | None, ranks: Callable[..., list[Any]]
) -> None:
    # bf16: worst 1.4e-3 in weights, products in another order
    tolerance = TOLERANCE if param_dtype is None else 2e-2
    for found, expected in zip(
        ranks(_sharded_steps, place, True, tied, param_dtype), ranks(_sharded_steps, place, False, tied, param_dtype)
    ):
        assert found[2] == [(4, {}, {})], "every loss ran in chunks"
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=tolerance, atol=tolerance)
        for weight, plain in zip(found[1], expected[1]):
            torch.testing.assert_close(weight, plain, rtol=tolerance, atol=tolerance)
