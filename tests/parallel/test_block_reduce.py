"""BlockReducer without Lightning: what DDP leaves in the gradients, in plain loops, on one to three ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.parallel.block_reduce import BlockReducer

Run = Callable[..., list[Any]]
# A sum of three terms in another order: the worst relative difference of a gradient seen is 3e-7.
THREE_RANKS = 2e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.narrow = nn.Linear(8, 8).bfloat16()
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor, skip: int | None = None) -> Tensor:
        x = self.conv(x).mean((2, 3))
        for number, layer in enumerate(self.layers):
            x = x if number == skip else torch.tanh(layer(x))
        return self.narrow(x.bfloat16()).float().square().mean()


def _gradients(rank: int, bucket_bytes: int) -> list[list[Tensor | None]]:
    found = []
    for ours in (False, True):
        module = Net()
        reducer = BlockReducer(module, bucket_bytes=bucket_bytes) if ours else None
        model = module if ours else DistributedDataParallel(module, find_unused_parameters=True)
        generator = torch.Generator().manual_seed(rank)
        kept: list[Tensor | None] = []
        for step, (skip, last) in enumerate([(None, True), (rank, True), (1, False), (2 + rank % 2, True), (3, True)]):
            owner: Any = reducer if ours else model
            with nullcontext() if last else owner.no_sync():
                x = torch.randn(4, 3, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
                loss = model(x, skip)
                with reducer.watch(loss) if reducer else nullcontext():
                    loss.backward()
            if last:
                kept += [None if p.grad is None else p.grad.clone() for p in module.parameters()]
                module.zero_grad(set_to_none=step != 1)
        if reducer:
            assert all(p.grad is None or p.grad.stride() == p.stride() for p in module.parameters())
            reducer.close()
            assert not any(p._post_accumulate_grad_hooks for p in module.parameters())
        found.append(kept)
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_those_of_ddp_that_looks_for_unused_parameters(
    world_size: int, bucket_bytes: int, ranks: Run
) -> None:
    all_found = ranks(_gradients, bucket_bytes, world_size=world_size)
    for theirs, ours in all_found:
        assert len(theirs) == len(ours) == 4 * 14
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is None or b is None:
                continue
            if world_size == 2:
                assert torch.equal(a, b)
            else:
                bf16 = a.dtype == torch.bfloat16
                torch.testing.assert_close(a, b, rtol=2e-2 if bf16 else THREE_RANKS, atol=1e-3 if bf16 else 1e-7)
        for a, b in zip(ours, all_found[0][1], strict=True):
            assert a is None or torch.equal(a, b), "the ranks agree in every bit"


def _alone(rank: int) -> list[Any]:
    module, plain = Net(), Net()
    x = torch.randn(4, 3, 6, 6)
    reducer = BlockReducer(module, bucket_bytes=100)
    order: list[int] = []
    handle = reducer.register_reduced_hook(lambda p: order.append(id(p)))
    module(x).backward()
    plain(x).backward()
    handle.remove()
    module(x).backward()
    plain(x).backward()
    used = [id(p) for n, p in module.named_parameters() if "never" not in n]
    same = all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(module.parameters(), plain.parameters(), strict=True)
        if q.grad is not None
    )
    return [same, sorted(order) == sorted(used)]


def test_a_single_rank_gets_its_own_gradients_and_its_hooks(ranks: Run) -> None:
    assert ranks(_alone, world_size=1) == [[True, True]]


def _sending(rank: int) -> list[Tensor]:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reducer = BlockReducer(module, bucket_bytes=1)
    for parameter in module.parameters():
        parameter.data.fill_(0.5)

    def complete(parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            parameter.grad = torch.full_like(parameter, 1.0 + rank)
        else:
            parameter.grad += 1.0 + rank

    reducer.register_sending_hook(complete)
    module[1](torch.ones(2, 4)).sum().backward()
    return [p.grad.clone() for p in module.parameters()]


def test_a_sending_hook_adds_to_a_gradient_or_makes_it_before_the_average(ranks: Run) -> None:
    first, second = ranks(_sending)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], torch.full((4, 4), 1.5)), "not in the graph: made by the hook"
    assert torch.equal(first[3], torch.full((4,), 2.0 + 1.5))


def _order(rank: int) -> list[Any]:
    module = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
    reducer = BlockReducer(module, bucket_bytes=1)
    before = [bucket.indices for bucket in reducer.buckets]

    def forward(order: list[int]) -> Tensor:
        x = torch.ones(1, 4)
        for number in order:
            x = module[number](x)
        return x.sum()

    # Rank zero's order counts, and what rank one did not use comes last.
    forward([2, 0, 1, 3] if rank == 0 else [0, 1, 2]).backward()
    after = [bucket.indices for bucket in reducer.buckets]
    forward([3, 2] if rank == 0 else [1]).backward()
    return [before, after, [p.grad.clone() for p in module.parameters()]]


def test_buckets_are_ordered_as_gradients_arrived_on_rank_zero(ranks: Run) -> None:
    (before, after, first), (_, other, second) = ranks(_order)
    assert before == [(3,), (2,), (1,), (0,)]
    assert after == other == [(1,), (0,), (2,), (3,)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _refused(rank: int) -> list[str]:
    messages = []
    with pytest.raises(ConfigurationError) as caught:
        BlockReducer(nn.Embedding(4, 4, sparse=True), bucket_bytes=1)
    messages.append(str(caught.value))

    class Sparse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.eye(4).to_sparse()

    module = nn.Linear(4, 4, bias=False)
    reducer = BlockReducer(module, bucket_bytes=1)
    loss = Sparse.apply(module.weight)
    with pytest.raises(RuntimeError) as late, reducer.watch(loss):
        loss.backward()
    messages.append(str(late.value))
    return messages


def test_sparse_gradients_are_refused_by_name(ranks: Run) -> None:
    for early, late in ranks(_refused):
        assert "makes sparse gradients (sparse=True)" in early
        assert "the gradient of weight is sparse" in late


def _copied(rank: int) -> bool:
    module = nn.Linear(4, 4)
    BlockReducer(module, bucket_bytes=1)
    return not any(p._post_accumulate_grad_hooks for p in copy.deepcopy(module).parameters())


def test_a_copy_of_the_module_carries_no_hooks(ranks: Run) -> None:
    assert ranks(_copied) == [True, True]
