"""Optimizer swap and early zero_grad on two processes: DDP, and FSDP2 with a module that shards itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_memsave import ConfigurationError, EarlyZeroGrad, LowMemoryOptimizer
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.state_bytes import held_state_bytes
from lightning_memsave.optim.zero_grad import gradient_bytes

Result = dict[str, Any]
NAMES = [row.name for row in OPTIMIZERS.values() if row.master == "0"]  # those with masters want bf16 weights


class Watched(LitLM):
    """Notes the gradient bytes at the start of each forward; every rank trains on the whole batch."""

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        self._build()
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.net.blocks, self.net):
            fully_shard(part, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.__dict__.setdefault("alive", []).append(gradient_bytes(self.trainer.optimizers))
        return super().training_step(batch, batch_idx)


def train(
    strategy: Any, *callbacks: Any, ckpt_path: str | None = None, save: str | None = None, **options: Any
) -> Result:
    warnings.simplefilter("ignore")
    sharded = isinstance(strategy, ModelParallelStrategy)
    module = Watched(build_in="configure_model" if sharded else "init")
    trainer = make_trainer(
        callbacks=[*callbacks],
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return {
        "losses": module.losses,
        "alive": module.alive,
        "state": {k: getattr(v, "full_tensor", v.clone)() for k, v in module.state_dict().items()},
        "held": held_state_bytes(trainer.optimizers[0]),
    }


def alone(*callbacks: Any) -> Result:
    module = LitLM()
    trainer = make_trainer(callbacks=[*callbacks], max_epochs=2)
    trainer.fit(module, make_loader())
    return {"losses": module.losses, "state": module.state_dict(), "held": held_state_bytes(trainer.optimizers[0])}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert [k for k in b if not torch.equal(a[k], b[k])] == []


# -- DDP ---------------------------------------------------------------------------------------------------------------
def _ddp(rank: int, folder: str) -> dict[str, Result]:
    results = {}
    for name in NAMES:
        results[name] = train("ddp", LowMemoryOptimizer(name), EarlyZeroGrad())
        path = f"{folder}/{name}.ckpt"
        train("ddp", LowMemoryOptimizer(name), EarlyZeroGrad(), max_epochs=1, save=path)
        results[name]["resumed"] = train("ddp", LowMemoryOptimizer(name), EarlyZeroGrad(), ckpt_path=path)
    return results


def test_under_ddp_every_optimizer_trains_as_alone_and_resumes(ranks: Callable[..., list[Any]], tmp_path) -> None:
    both = ranks(_ddp, str(tmp_path))
    for name in NAMES:
        single = alone(LowMemoryOptimizer(name))
        for results in both:
            one = results[name]
            assert one["losses"] == single["losses"]  # both ranks see the same batches, so the mean is the value
            assert_same(one["state"], single["state"])
            assert one["held"] == single["held"]
            assert one["resumed"]["losses"] == single["losses"][3:]
            assert_same(one["resumed"]["state"], single["state"])


def _early(rank: int) -> list[Result]:
    strategies = [DDPStrategy(gradient_as_bucket_view=view) for view in (False, False, True, True)]
    return [train(s, *([EarlyZeroGrad()] if i % 2 else [])) for i, s in enumerate(strategies)]


def test_gradients_are_freed_early_under_ddp_with_either_kind_of_buckets(ranks: Callable[..., list[Any]]) -> None:
    for plain, early, plain_view, early_view in ranks(_early):
        for without, with_it in ((plain, early), (plain_view, early_view)):
            assert with_it["losses"] == without["losses"]
            assert_same(with_it["state"], without["state"])
            assert with_it["alive"] == [0] * 6
            assert without["alive"][1] > 0


# -- FSDP2 -------------------------------------------------------------------------------------------------------------
def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def _fsdp2(rank: int) -> dict[str, Result]:
    return {"plain": train(fsdp2()), "early": train(fsdp2(), EarlyZeroGrad())}


def test_under_fsdp2_gradients_are_freed_early(ranks: Callable[..., list[Any]]) -> None:
    for result in ranks(_fsdp2):
        assert result["early"]["losses"] == result["plain"]["losses"]
        assert_same(result["early"]["state"], result["plain"]["state"])
        assert result["early"]["alive"] == [0] * 6
        assert result["plain"]["alive"][1] > 0


def _refused(rank: int) -> list[str]:
    messages = []
    for row in OPTIMIZERS.values():
        if not row.local_shards:
            with pytest.raises(ConfigurationError) as caught:
                train(fsdp2(), LowMemoryOptimizer(row.name))
            messages.append(str(caught.value))
    return messages


def test_names_that_step_on_whole_tensors_are_refused_under_fsdp2(ranks: Callable[..., list[Any]]) -> None:
    for messages in ranks(_refused):
        assert messages
        assert all(
            "steps on whole tensors, and the parameters are sharded (DTensor)" in message for message in messages
        )
        assert any(message.startswith("LowMemoryOptimizer: adafactor") for message in messages)


def _held(rank: int) -> int:
    module = nn.Linear(8, 8, bias=False)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return held_state_bytes(optimizer)


def test_held_bytes_are_those_of_the_rank(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(_held) == [2 * 4 * 32 + 4] * 2
