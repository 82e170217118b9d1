"""Optimizers on the shards of FSDP2 and tensor parallelism: bytes, numbers, and resume from both kinds of checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lightning_memsave import LowMemoryOptimizer
from lightning_memsave.optim.local_shards import local_part
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.state_bytes import held_state_bytes
from lightning_memsave.optim.zero_grad import gradient_bytes

NAMES = [row.name for row in OPTIMIZERS.values() if row.local_shards]
# Rows of 72 values: a block of 256 ends inside a row, and the shards' blocks are not those of the whole tensor.
UNEVEN = {"width": 72, "vocabulary": 67}
Result = dict[str, Any]


class Sharded(LitLM):
    """Shards itself; every rank trains on the whole batch."""

    def __init__(self, **network: Any) -> None:
        super().__init__("configure_model", **network)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        wide = [p for n, p in self.named_parameters() if "embedding" in n or "norm" in n]
        rest = [p for n, p in self.named_parameters() if "embedding" not in n and "norm" not in n]
        return torch.optim.AdamW([{"params": wide, "wide": True}, {"params": rest}], lr=self.lr)

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        self._build()
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.net.blocks, self.net):
            fully_shard(part, mesh=mesh)


def fsdp2(distributed: bool = True) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=dist.get_world_size(), tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )


def train(
    name: str,
    *callbacks: Any,
    strategy: Any = "auto",
    module: LitLM | None = None,
    ckpt_path: Any = None,
    save: Any = None,
    devices: int | None = None,
    **options: Any,
) -> Result:
    warnings.simplefilter("ignore")
    module = module or Sharded(**UNEVEN)
    trainer = make_trainer(
        callbacks=[*callbacks, LowMemoryOptimizer(name)] if name else [*callbacks],
        strategy=strategy,
        devices=devices or (1 if strategy == "auto" else dist.get_world_size()),
        use_distributed_sampler=False,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(module, make_loader(vocabulary=module.network.get("vocabulary", 64)), ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return {
        "losses": module.losses,
        "weights": {k: getattr(v, "full_tensor", v.clone)() for k, v in module.state_dict().items()},
        "held": held_state_bytes(trainer.optimizers[0]),
        "bytes": expected_bytes(trainer.optimizers[0], name),
    }


def expected_bytes(optimizer: torch.optim.Optimizer, name: str) -> int:
    """The formulas of the docstring, on this rank's shards."""
    row, moments = OPTIMIZERS[name], 1 if "lion" in name else 2
    wide = {id(p) for group in optimizer.param_groups for p in group["params"] if group.get("wide")}
    total = row.shared_bytes
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        values = local_part(p).numel()
        narrow = row.bits == 8 and p.numel() >= 4096 and id(p) not in wide
        total += moments * (values + 4 * -(-values // 256) if narrow else 4 * values)
    return total


def alone(name: str, **network: Any) -> Result:
    return train(name, module=LitLM(**network))


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [key for key in b if not torch.equal(a[key], b[key])]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in b)


# -- FSDP2 -------------------------------------------------------------------------------------------------------------
ALIGNED = {"width": 256, "depth": 1}  # every shard begins a block of 256


def _aligned(rank: int) -> dict[str, Result]:
    return {name: train(name, strategy=fsdp2(), module=Sharded(**ALIGNED)) for name in NAMES}


def test_a_run_on_shards_is_the_run_of_one_process_where_blocks_coincide(ranks: Callable[..., list[Any]]) -> None:
    both = ranks(_aligned)
    for name in NAMES:
        single = alone(name, **ALIGNED)
        for results in both:
            assert results[name]["losses"] == single["losses"]  # the mean of two equal gradients is the gradient
            assert differing(results[name]["weights"], single["weights"]) == []
            assert results[name]["held"] == results[name]["bytes"]


def _resumes(rank: int, folder: str) -> dict[str, Result]:
    results = {}
    for name in NAMES:
        results[name] = train(name, strategy=fsdp2())
        for kind in (True, False):
            path = f"{folder}/{name}-{kind}"
            train(name, strategy=fsdp2(kind), max_epochs=1, save=path)
            dist.barrier()
            results[name][kind] = train(name, strategy=fsdp2(kind), ckpt_path=path)
    return results


def test_both_kinds_of_checkpoint_resume_bit_for_bit(ranks: Callable[..., list[Any]], tmp_path) -> None:
    for results in ranks(_resumes, str(tmp_path)):
        for result in results.values():
            assert result["held"] == result["bytes"]
            for kind in (True, False):
                assert result[kind]["losses"] == result["losses"][3:]
                assert differing(result[kind]["weights"], result["weights"]) == []
                assert result[kind]["held"] == result["bytes"]
