"""GradientRelease on two processes: FSDP2 and tensor parallel modules, memsave_ddp, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LitLM, Tokens, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_memsave import ActivationCheckpointing, ConfigurationError, GradientRelease, IncompatibleMethodsError
from lightning_memsave.optim.zero_grad import gradient_bytes

Result = dict[str, Any]
NORM = {"gradient_clip_val": 0.05}
VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
# (what is released, the Trainer's options); "host" and "two_pass" have no effect where they are not asked for
CASES: list[dict[str, Any]] = [
    {},
    NORM,
    VALUE,
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 2, **NORM},
    {"precision": "bf16-true", **NORM},
]
IDS = ["plain", "norm", "value", "accumulate", "accumulate, norm", "bf16"]


class Trained(LitLM):
    """Dropout, a schedule, and the gradients that Lightning's own step sees."""

    def __init__(self, **options: Any) -> None:
        self.seen: list[int] = []
        super().__init__(**{"width": 32, "dropout": 0.1, **options})

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(gradient_bytes([optimizer]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))]


class Sharded(Trained):
    """FSDP2 by block."""

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        self._build()
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.net.blocks, self.net):
            fully_shard(part, mesh=mesh)


class Parallel(Trained):
    """The feed-forward layers are split over the ranks, the rest is not."""

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        self._build()
        for block in self.net.blocks:
            parallelize_module(
                block, self.device_mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
            )

    def configure_optimizers(self) -> Any:  # torch's AdamW steps no mixed lists
        return torch.optim.AdamW(self.parameters(), lr=1e-2, foreach=False)


def train(
    module: Any, strategy: Any, *callbacks: Any, own_data: bool = True, ckpt_path: Any = None, **options: Any
) -> tuple[Result, Any]:
    warnings.simplefilter("ignore")
    trainer = make_trainer(
        strategy=strategy,
        devices=2,
        callbacks=list(callbacks),
        use_distributed_sampler=own_data,
        **{"max_epochs": 2, **options},
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(Tokens(num_rows=40), batch_size=4), ckpt_path=ckpt_path)
    state = {k: getattr(v, "full_tensor", v.clone)() for k, v in module.state_dict().items()}
    return {"losses": module.losses, "state": state, "seen": module.seen, "steps": trainer.global_step}, trainer


def assert_same(found: Result, expected: Result) -> None:
    assert found["losses"] == expected["losses"]
    assert found["steps"] == expected["steps"]
    assert [k for k, v in expected["state"].items() if not torch.equal(found["state"][k], v)] == []


def release() -> GradientRelease:
    return GradientRelease(clip="two_pass", accumulate="host")


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


# -- FSDP2 -------------------------------------------------------------------------------------------------------------
def _fsdp2(rank: int, number: int) -> tuple[Result, Result]:
    options = CASES[number]
    plain, _ = train(Sharded(build_in="configure_model"), fsdp2(), **options)
    found, _ = train(Sharded(build_in="configure_model"), fsdp2(), release(), **options)
    return found, plain


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_under_fsdp2_a_run_ends_with_the_bits_of_a_plain_one(number: int, ranks: Callable[..., list[Any]]) -> None:
    for found, plain in ranks(_fsdp2, number):
        assert_same(found, plain)
        assert set(found["seen"]) == {0}
        assert min(plain["seen"]) > 0


def _fsdp2_checkpointed(rank: int) -> tuple[Result, Result]:
    plain, _ = train(Sharded(build_in="configure_model"), fsdp2(), ActivationCheckpointing("Block"), **NORM)
    callbacks = (ActivationCheckpointing("Block"), release())
    found, _ = train(Sharded(build_in="configure_model"), fsdp2(), *callbacks, **NORM)
    return found, plain


def test_two_passes_over_sharded_and_recomputed_blocks(ranks: Callable[..., list[Any]]) -> None:
    for found, plain in ranks(_fsdp2_checkpointed):
        assert_same(found, plain)


def _alive(rank: int) -> tuple[list[int], list[int]]:
    module = Sharded(build_in="configure_model")
    alive: list[int] = []

    def configured() -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        every = torch.optim.SGD(module.parameters(), lr=1.0)
        inner = optimizer.step

        def step(closure: Any = None) -> Any:
            if closure is None:
                alive.append(gradient_bytes([every]))
            return inner(closure)

        optimizer.step = step
        return optimizer

    module.configure_optimizers = configured
    train(module, fsdp2(), release(), max_steps=1)
    return alive, [p.to_local().nbytes for p in module.parameters()]


def test_under_fsdp2_no_more_than_one_block_of_gradient_shards_is_alive(ranks: Callable[..., list[Any]]) -> None:
    # FSDP2 reduces a block at once and then calls the hooks of its parameters, one after the other
    for alive, shards in ranks(_alive):
        assert len(alive) == len(shards)
        assert max(alive) < 0.6 * sum(shards)
        assert min(alive) <= max(shards)


# -- tensor parallel ---------------------------------------------------------------------------------------------------
def _parallel(rank: int) -> list[tuple[Result, Result]]:
    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)

    results = []
    for options in ({}, {"accumulate_grad_batches": 2}):  # its own clipping fails on mixed lists
        runs = [
            train(Parallel(build_in="configure_model", dropout=0.0), strategy(), *cb, own_data=False, **options)[0]
            for cb in ((release(),), ())
        ]
        results.append((runs[0], runs[1]))
    return results


def test_a_tensor_parallel_run_ends_with_the_bits_of_a_plain_one(ranks: Callable[..., list[Any]]) -> None:
    for results in ranks(_parallel):
        for found, plain in results:
            assert_same(found, plain)
            assert set(found["seen"]) == {0}


def _parallel_norm(rank: int) -> Result:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    module = Parallel(build_in="configure_model", dropout=0.0)
    return train(module, strategy, release(), own_data=False, **NORM)[0]


def test_a_norm_over_sharded_and_whole_tensors_is_that_of_one_process(ranks: Callable[..., list[Any]]) -> None:
    # Lightning's own clipping fails here: "got mixed torch.Tensor and DTensor"
    module = Trained(dropout=0.0)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False)
    trainer = make_trainer(max_epochs=2, **NORM)
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(Tokens(num_rows=40), batch_size=4))
    for found in ranks(_parallel_norm):
        # fp32 sums split over two ranks, ten steps of AdamW; the worst difference of a loss seen is 2.4e-7
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(module.losses), rtol=0, atol=2e-6)


# -- data parallel -----------------------------------------------------------------------------------------------------
class Gated(Trained):
    """Leaves the last block out in some batches, on one rank only or on both."""

    def loss(self, batch: Tensor) -> Tensor:
        number = len(self.losses)
        blocks = self.net.blocks if (number + self.global_rank) % 3 else self.net.blocks[:1]
        x = self.net.embedding(batch[:, :-1])
        for block in blocks:
            x = block(x)
        logits = self.net.head(self.net.norm(x))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _memsave_ddp(rank: int, kind: str, number: int) -> tuple[Result, Result]:
    build: Any = Trained if kind == "all" else Gated
    plain, _ = train(build(), "memsave_ddp", **CASES[number])
    found, _ = train(build(), "memsave_ddp", release(), **CASES[number])
    return found, plain


@pytest.mark.parametrize("kind", ["all", "gated"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_under_memsave_ddp_a_run_ends_with_the_bits_of_a_plain_one(
    kind: str, number: int, ranks: Callable[..., list[Any]]
) -> None:
    first, second = ranks(_memsave_ddp, kind, number)
    for found, plain in (first, second):
        assert_same(found, plain)
        assert set(found["seen"]) == {0}
    assert first[0]["losses"] != second[0]["losses"], "each rank has data of its own"
    assert [k for k, v in first[0]["state"].items() if not torch.equal(second[0]["state"][k], v)] == []


class StepsAfter(Trained):
    """Runs the closure before the step, which averages gradients where none are kept."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer_closure()
        optimizer.step()


def _steps_after(rank: int) -> str:
    with pytest.raises(ConfigurationError) as caught:
        train(StepsAfter(), "memsave_ddp", release())
    return str(caught.value)


def test_an_average_that_no_step_follows_is_refused(ranks: Callable[..., list[Any]]) -> None:
    for message in ranks(_steps_after):
        assert "averaged over the ranks in a backward that no step follows" in message


def _refused(rank: int, strategy: str) -> str:
    with pytest.raises(IncompatibleMethodsError) as caught:
        train(Trained(), strategy, release())
    return str(caught.value)


def test_ddp_is_refused_with_its_reason(ranks: Callable[..., list[Any]]) -> None:
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        for message in ranks(_refused, strategy):
            assert "'ddp' strategy: DDP averages gradients in buckets that hold a full set of them" in message
            assert "memsave_ddp" in message
