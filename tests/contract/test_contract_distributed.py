"""Two processes: the same callbacks under ddp, ddp_spawn and a module that shards itself with FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_memsave import apply, load_adapters
from lightning_memsave.planner.compatibility import cell

from .batches import loader
from .harness import assert_same_state, trainer_for
from .kinds import KINDS, build
from .methods import EXACT, EXACT_UNDER_DDP, OTHERS, make

Results = dict[str, tuple[list[float], dict[str, Tensor]]]


def _half(batch: Any, rank: int) -> Any:
    return {k: v[rank::2] for k, v in batch.items()} if isinstance(batch, dict) else batch[rank::2]


def _train_ddp(rank: int, kind: str, names: list[tuple[str, ...]], strategy: str = "ddp") -> Results:
    """Train on this rank's half of each batch, once per list of methods."""
    results = {}
    for chosen in names:
        module = build(kind)
        trainer = trainer_for(
            kind, [make(name, kind) for name in chosen], strategy=strategy, devices=2, use_distributed_sampler=False
        )
        torch.manual_seed(1)
        trainer.fit(module, loader([_half(batch, rank) for batch in KINDS[kind].batches()]))
        state = {k: v.detach().clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}
        results["+".join(chosen)] = (module.losses, state)
    return results


@pytest.mark.parametrize("kind", ["dropout", "hf_bert"])
def test_ddp_with_an_exact_method_equals_ddp_without(kind: str, ranks: Callable[..., list[Results]]) -> None:
    names = [(), *((name,) for name in EXACT_UNDER_DDP), EXACT_UNDER_DDP]
    for results in ranks(_train_ddp, kind, names):
        plain_losses, plain_state = results[""]
        for chosen in names[1:]:
            losses, state = results["+".join(chosen)]
            assert losses == plain_losses, chosen
            assert_same_state(state, plain_state)


def test_ddp_with_the_other_methods_keeps_the_ranks_equal(ranks: Callable[..., list[Results]]) -> None:
    names = [(name,) for name in OTHERS] + [("QLoRA", *EXACT_UNDER_DDP, "LowMemoryOptimizer")]
    first, second = ranks(_train_ddp, "hf_llama", names)
    for key, (losses, state) in first.items():
        other_losses, other_state = second[key]
        assert losses != other_losses, "each rank has data of its own"
        assert_same_state(state, other_state)


def _train_both(rank: int, kind: str, names: list[tuple[str, ...]]) -> tuple[Results, Results]:
    return _train_ddp(rank, kind, [()]), _train_ddp(rank, kind, names, "memsave_ddp")


def test_memsave_ddp_with_an_exact_method_equals_ddp_without(ranks: Callable[..., list[Any]]) -> None:
    names = [(), *((name,) for name in EXACT), EXACT]
    for plain, results in ranks(_train_both, "dropout", names):
        plain_losses, plain_state = plain[""]
        for losses, state in results.values():
            assert losses == plain_losses
            assert_same_state(state, plain_state)


def test_memsave_ddp_with_the_other_methods_is_ddp_with_them(ranks: Callable[..., list[Results]]) -> None:
    names = [(name,) for name in OTHERS if cell(name, "ddp")[0] != "no"]
    theirs, ours = ranks(_train_ddp, "hf_llama", names), ranks(_train_ddp, "hf_llama", names, "memsave_ddp")
    for expected, found in zip(theirs, ours, strict=True):
        for key, (losses, state) in found.items():
            assert losses == expected[key][0], key
            assert_same_state(state, expected[key][1])


class ShardedLM(LitLM):
    """A module that shards itself, as ``ModelParallelStrategy`` asks its users to."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if hasattr(self, "net"):
            return
        self._build()
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def _train_fsdp2(rank: int) -> list[tuple[list[float], dict[str, Tensor]]]:
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.tensor import DTensor

    results = []
    for callbacks in ([], [make(name, "language") for name in EXACT if cell(name, "fsdp2")[0] == "yes"]):
        module = ShardedLM(build_in="configure_model", width=32)
        trainer = make_trainer(
            pl,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            devices=2,
            max_epochs=2,
            callbacks=callbacks,
        )
        torch.manual_seed(1)
        trainer.fit(module, make_loader())
        assert all(isinstance(p, DTensor) for p in module.net.blocks.parameters())
        results.append((module.losses, {k: v.full_tensor() for k, v in module.state_dict().items()}))
    return results


def test_exact_methods_on_a_module_that_shards_itself(ranks: Callable[..., list[Any]]) -> None:
    for plain, saved in ranks(_train_fsdp2):
        assert saved[0] == plain[0]
        assert_same_state(saved[1], plain[1])


# Forked processes take 2 s and spawned ones 20 s; only those pickle the callbacks.
SPAWNING = ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)]


def _train_two(strategy: str, callbacks: list[Any], **options: Any) -> LitLM:
    module = LitLM()
    torch.manual_seed(1)
    trainer = make_trainer(pl, strategy=strategy, devices=2, callbacks=callbacks, **options)
    trainer.fit(module, make_loader(batch_size=4))
    return module


def _trained_in_launched_processes(rank: int, name: str) -> dict[str, Tensor]:
    return _train_two("ddp", [make(name, "language")]).state_dict()


@pytest.mark.parametrize("strategy", SPAWNING)
def test_ddp_spawn_brings_the_weights_of_exact_methods_back(strategy: str) -> None:
    callbacks = [make(name, "language") for name in EXACT_UNDER_DDP]
    assert_same_state(_train_two(strategy, callbacks).state_dict(), _train_two(strategy, []).state_dict())


@pytest.mark.parametrize("strategy", SPAWNING)
@pytest.mark.parametrize("name", [name for name in OTHERS if cell(name, "ddp_spawn")[0] == "yes"])
def test_ddp_spawn_trains_as_ddp_does_and_brings_the_weights_back(
    name: str, strategy: str, ranks: Callable[..., list[dict[str, Tensor]]]
) -> None:
    module = _train_two(strategy, [make(name, "language")])
    assert_same_state(module.state_dict(), ranks(_trained_in_launched_processes, name)[0])


@pytest.mark.filterwarnings("ignore:.*Read what was trained from the checkpoint.*")
@pytest.mark.parametrize("strategy", SPAWNING)
@pytest.mark.parametrize("name", [name for name in OTHERS if cell(name, "ddp_spawn")[0] == "partly"])
def test_what_changes_the_base_is_read_from_the_checkpoint_after_ddp_spawn(
    name: str, strategy: str, ranks: Callable[..., list[dict[str, Tensor]]]
) -> None:
    callbacks = [make(name, "language"), ModelCheckpoint("c", filename="c")]
    left = _train_two(strategy, callbacks, enable_checkpointing=True)
    assert_same_state(left.state_dict(), LitLM().state_dict())
    module = LitLM()
    apply(module, [make(name, "language")])
    load_adapters(module, "c/c.ckpt")
    assert_same_state(module.state_dict(), ranks(_trained_in_launched_processes, name)[0])
