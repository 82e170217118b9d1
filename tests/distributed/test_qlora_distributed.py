"""Two processes: adapters on quantized weights under ddp and FSDP2 train as one process does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LitLM, Tokens, make_loader, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_memsave import ActivationCheckpointing, LoRA, QLoRA, WeightQuantization, apply
from lightning_memsave.errors import ConfigurationError

SAVERS: dict[str, Callable[[], list[Any]]] = {
    "lora": lambda: [LoRA(rank=4, frozen_dtype="bf16")],
    "nf4": lambda: [QLoRA(rank=4)],
    "int8": lambda: [QLoRA(rank=4, kind="int8")],
    "dora": lambda: [WeightQuantization("nf4"), LoRA(rank=4, variant="dora")],
    "checkpointing": lambda: [QLoRA(rank=4), ActivationCheckpointing()],
}
# Summing gradients of two halves rounds differently; worst seen 2.4e-7.
TOLERANCE = 1e-5

Result = tuple[list[float], dict[str, Tensor]]


def loaders(rank: int | None) -> DataLoader:
    """All rows, or every second one; the mean over the ranks of a mean over half a batch is that over the batch."""
    if rank is None:
        return make_loader()
    ids = Tokens().ids
    batches = [ids[i : i + 8][rank::2] for i in range(0, 24, 8)]
    return DataLoader(batches, batch_size=None)


def trained(module: LitLM) -> dict[str, Tensor]:
    found = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in found.items()}


def train(rank: int | None, savers: list[Any], module: LitLM, **trainer: Any) -> Result:
    torch.manual_seed(1)
    options = {} if rank is None else {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = make_trainer(callbacks=savers, max_epochs=2, **{**options, **trainer})
    trainer.fit(module, loaders(rank))
    return module.losses, trained(module)


def assert_mean_of_ranks(results: list[Result], single: Result) -> None:
    mean = torch.tensor([losses for losses, _ in results]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(single[0]), rtol=TOLERANCE, atol=TOLERANCE)
    for _, state in results:
        assert state.keys() == single[1].keys()
        for name, value in single[1].items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


def _ddp(rank: int, names: list[str]) -> dict[str, Result]:
    return {name: train(rank, SAVERS[name](), LitLM()) for name in names}


def test_ddp_equals_one_process_on_the_whole_batch(ranks: Callable[..., list[dict[str, Result]]]) -> None:
    results = ranks(_ddp, list(SAVERS))
    for name, savers in SAVERS.items():
        assert_mean_of_ranks([r[name] for r in results], train(None, savers(), LitLM()))


def _draw(rank: int) -> tuple[dict[str, Tensor], Tensor]:
    module = LitLM()
    torch.manual_seed(rank)
    apply(module, [LoRA(rank=4)])
    return trained(module), torch.rand(4)


def test_ranks_draw_the_same_adapters_and_keep_their_own_streams(ranks: Callable[..., list[Any]]) -> None:
    # a sharding strategy does not broadcast weights; rank 0 draws what it would draw alone
    (first, stream), (second, other_stream) = ranks(_draw)
    alone, own = _draw(0)
    assert all(torch.equal(first[n], second[n]) and torch.equal(first[n], alone[n]) for n in alone)
    assert torch.equal(stream, own)
    assert not torch.equal(stream, other_stream)


class Sharded(LitLM):
    """Shards itself, with or without quantizing and adapting itself before."""

    def __init__(self, savers: list[Any], **options: Any) -> None:
        super().__init__(build_in="configure_model", **options)
        self.savers = savers

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        super().configure_model()
        if self.savers:
            torch.manual_seed(1)
            apply(self, self.savers)
        for block in self.net.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _fsdp2(rank: int, names: list[str]) -> dict[str, tuple[Result, int]]:
    results = {}
    for name in names:
        module = Sharded(SAVERS[name]())
        result = train(rank, [], module, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
        codes = [p.to_local() for p in module.parameters() if isinstance(p, DTensor) and not p.is_floating_point()]
        results[name] = (result, sum(code.nbytes for code in codes))
    return results


def test_a_module_that_quantizes_itself_before_it_shards_trains(ranks: Callable[..., list[Any]]) -> None:
    names = ["nf4", "lora", "checkpointing"]
    results = ranks(_fsdp2, names)
    for name in names:
        assert_mean_of_ranks([r[name][0] for r in results], train(None, SAVERS[name](), LitLM()))
    whole = sum(p.nbytes for n, p in _quantized().named_parameters() if p.dtype == torch.uint8)
    assert [r["nf4"][1] for r in results] == [whole // 2] * 2, "each rank holds half of the codes"


def _quantized() -> LitLM:
    module = LitLM()
    apply(module, [QLoRA(rank=4)])
    return module


def _sharded_before(rank: int) -> str:
    with pytest.raises(ConfigurationError) as error:
        train(
            rank,
            [QLoRA(rank=4)],
            Sharded([]),
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        )
    return str(error.value)


def test_weights_that_are_sharded_already_are_refused(ranks: Callable[..., list[str]]) -> None:
    for message in ranks(_sharded_before):
        assert "is sharded already (DTensor), and this needs whole weights" in message
        assert "fully_shard" in message
