"""Length-grouped batches are a permutation, hold little padding, and are the same ones on every rank."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_trainer
from torch.utils.data import DataLoader

from lightning_memsave import ConfigurationError, LengthGroupedSampler

LENGTHS = torch.empty(1000).log_normal_(4.0, 1.0, generator=torch.Generator().manual_seed(0)).long().clamp(1, 1024)


def padding_share(lengths: torch.Tensor, batch_size: int) -> float:
    held = sum(len(batch) * int(batch.max()) for batch in lengths.split(batch_size))
    return 1 - int(lengths.sum()) / held


@pytest.mark.parametrize("batch_size", [1, 7, 8, 1000, 2000])
def test_an_epoch_is_a_permutation(batch_size: int) -> None:
    sampler = LengthGroupedSampler(LENGTHS, batch_size)
    assert sorted(sampler) == list(range(1000))
    assert len(sampler) == 1000


def test_most_of_the_padding_of_random_batches_is_gone() -> None:
    shuffled = LENGTHS[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    sampler = LengthGroupedSampler(LENGTHS, 8)
    share = padding_share(LENGTHS[list(sampler)], 8)
    # Seen: 0.67 at random, 0.097 grouped; more samples allow larger pools (0.025 with 100,000).
    assert padding_share(shuffled, 8) > 0.6
    assert share < 0.15
    assert sampler.padding_share() == pytest.approx(share)


def test_the_longest_sample_is_in_the_first_batch() -> None:
    for epoch in range(5):
        sampler = LengthGroupedSampler(LENGTHS, 8)
        sampler.set_epoch(epoch)
        assert int(LENGTHS[list(sampler)[:8]].max()) == int(LENGTHS.max())


def test_the_order_follows_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(LENGTHS, 8, seed=seed)
        torch.rand(1)  # the global generator is not asked
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batches_mix_samples_over_epochs() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 8)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append({frozenset(part.tolist()) for part in torch.tensor(list(sampler)).split(8)})
    assert len(epochs[0] & epochs[1]) < 3


@pytest.mark.parametrize(("count", "ranks"), [(1000, 2), (999, 4), (3, 4), (17, 3)])
def test_ranks_share_the_epoch(count: int, ranks: int) -> None:
    parts = [list(LengthGroupedSampler(LENGTHS[:count], 4, num_replicas=ranks, rank=r)) for r in range(ranks)]
    assert {len(part) for part in parts} == {-(-count // ranks)}
    assert {i for part in parts for i in part} == set(range(count))
    assert len(LengthGroupedSampler(LENGTHS[:count], 4, num_replicas=ranks, rank=0)) == len(parts[0])
    dropped = [
        list(LengthGroupedSampler(LENGTHS[:count], 4, num_replicas=ranks, rank=r, drop_last=True)) for r in range(ranks)
    ]
    assert {len(part) for part in dropped} == {count // ranks}
    assert len({i for part in dropped for i in part}) == count // ranks * ranks


def test_batches_that_run_at_the_same_time_have_similar_lengths() -> None:
    parts = [LENGTHS[list(LengthGroupedSampler(LENGTHS, 8, num_replicas=4, rank=r))].split(8) for r in range(4)]
    waiting = [max(int(b.max()) for b in step) / max(1, min(int(b.max()) for b in step)) for step in zip(*parts)]
    # Seen: 1.08 on average; random order has 2.9.
    assert sum(waiting) / len(waiting) < 1.2


def test_a_data_set_is_counted() -> None:
    samples = [{"input_ids": [1] * int(n)} for n in LENGTHS[:50]]
    assert list(LengthGroupedSampler(samples, 4)) == list(LengthGroupedSampler(LENGTHS[:50].tolist(), 4))


def test_wrong_arguments_are_listed() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)batch_size=0.*num_replicas=2, rank=None"):
        LengthGroupedSampler([1], 0, num_replicas=2)
    with pytest.raises(ConfigurationError, match="0 <= rank < num_replicas"):
        LengthGroupedSampler([1], 1, num_replicas=2, rank=2)
    with pytest.raises(ConfigurationError, match="no samples"):
        LengthGroupedSampler([], 1)


class Seen(LitLM):
    """Remembers the rows that each step got: their first token is their index."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.rows.append(batch[:, 0].tolist())
        return super().training_step(batch, batch_idx)


def rows_of(num_samples: int, **trainer: object) -> list[list[int]]:
    data = torch.arange(num_samples)[:, None].expand(-1, 4).contiguous()
    loader = DataLoader(data, 4, sampler=LengthGroupedSampler(LENGTHS[:num_samples], 4))
    module = Seen()
    make_trainer(pl, max_epochs=2, **trainer).fit(module, loader)
    return module.rows


def on_rank(rank: int, use_distributed_sampler: bool) -> list[list[int]]:
    return rows_of(40, devices=2, strategy="ddp", use_distributed_sampler=use_distributed_sampler)


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_under_ddp_every_sample_comes_once_an_epoch(ranks: object, use_distributed_sampler: bool) -> None:
    one, two = ranks(on_rank, use_distributed_sampler)  # type: ignore[operator]
    assert len(one) == len(two) == 2 * 5
    epochs = [[i for step in part[e * 5 : e * 5 + 5] for i in step] for e in range(2) for part in (one, two)]
    assert sorted(epochs[0] + epochs[1]) == sorted(epochs[2] + epochs[3]) == list(range(40))
    assert epochs[0] != epochs[2]
    # The sampler's own batches: Lightning has not shuffled them again.
    expected = LengthGroupedSampler(LENGTHS[:40], 4, num_replicas=2, rank=0)
    assert epochs[0] == list(expected)


def test_lightning_tells_the_sampler_each_epoch() -> None:
    rows = rows_of(40)
    assert sorted(i for step in rows[:10] for i in step) == list(range(40))
    assert rows[:10] != rows[10:]
