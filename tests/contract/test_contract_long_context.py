"""Everything for long sequences and full fine-tuning at once on an unmodified module: the training of the plain run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitLM, ShardedLM, make_loader, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_memsave import (
    ActivationCheckpointing,
    ActivationOffloading,
    AttentionKernel,
    ChunkedLoss,
    GradientRelease,
    QLoRA,
    TiledCompute,
)

# Sums over chunks and tiles are added in another order. Worst difference of a weight after three steps of AdamW that
# was seen: 6.1e-15 in fp64, 4.8e-7 in fp32.
FP64, FP32 = 1e-12, 1e-5


def everything(place: Path, release: bool = True) -> list[Any]:
    return [
        TiledCompute(["*norm*", "*.up", "*.down"], tile_tokens=8),
        ChunkedLoss(chunk_tokens=64),
        ActivationOffloading(device=place, min_bytes=1),
        ActivationCheckpointing(),
        AttentionKernel(),
        *([GradientRelease(clip="two_pass")] if release else []),
    ]


def train(module: Any, callbacks: list[Any], **options: Any) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(1)
    trainer = make_trainer(callbacks=callbacks, gradient_clip_val=0.5, **options)
    trainer.fit(module, make_loader(batch_size=4, num_tokens=33))
    return module.losses, [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in module.parameters()]


def assert_close(found: tuple[list[float], list[Tensor]], plain: tuple[list[float], list[Tensor]], atol: float) -> None:
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(plain[0]), rtol=0, atol=atol)
    for expected, other in zip(plain[1], found[1], strict=True):
        torch.testing.assert_close(other, expected, rtol=0, atol=atol)


def test_all_of_them_together_train_as_the_plain_module(tmp_path: Path) -> None:
    plain = train(LitLM().double(), [])
    assert_close(train(LitLM().double(), everything(tmp_path)), plain, FP64)
    assert not list(tmp_path.iterdir())


def test_all_of_them_with_adapters_on_a_4bit_base_train_as_the_adapters_alone(tmp_path: Path) -> None:
    adapters = {"rank": 4, "modules": ["*.q_proj", "*.up", "*.down"]}
    plain = train(LitLM(), [QLoRA(**adapters)])
    assert_close(train(LitLM(), [QLoRA(**adapters), *everything(tmp_path)]), plain, FP32)


def sharded(rank: int, place: str) -> Any:
    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    def make() -> ShardedLM:
        return ShardedLM()

    plain = train(make(), [], devices=2, strategy=strategy())
    return plain, train(make(), everything(Path(place)), devices=2, strategy=strategy())


@pytest.mark.timeout(180)
def test_all_of_them_under_fsdp2_train_as_the_plain_module(ranks: Any, tmp_path: Path) -> None:
    for plain, found in ranks(sharded, str(tmp_path)):
        assert_close(found, plain, FP64)
