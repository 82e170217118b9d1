"""Batches of samples of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from lightning_memsave.data._samples import sample_lengths
from lightning_memsave.errors import raise_problems

__all__ = ["LengthGroupedSampler"]

# Batches whose samples are sorted together, at most (and at most half of the epoch, so that every epoch has batches of
# its own). More: less padding, less randomness. With lengths spread as exp(normal(4, 1)) and batches of 8, padding is
# 67 % at random, 30 % with pools of 10 batches, 10 % with 50 and 2.5 % with 200.
_POOL_BATCHES = 200


class LengthGroupedSampler(DistributedSampler[Any]):
    """Draw batches of samples of similar length, in random order.

    Every epoch is a permutation of the samples by ``seed`` and epoch: shuffled, sorted by length within pools of 200
    batches, cut into batches, and the batches shuffled. The batch with the longest sample comes first, so that a run
    that does not fit in memory fails at once.

    It shards itself over the ranks: the batches that the ranks run at the same time have similar lengths too. Being a
    ``DistributedSampler`` it is left alone by Lightning, with ``use_distributed_sampler`` on and off, and told each
    epoch.

    **Saves** most of the padding of random batches: ``batch_size * longest - sum`` tokens of each batch in every
    activation.
    **Costs** one sort an epoch and 8 bytes a sample; batches are less mixed than random ones.
    **Numerics** only the order of samples changes.

    Args:
        lengths: Tokens of each sample, or the data set itself, whose ``input_ids`` are then counted once.
        batch_size: The ``batch_size`` of the ``DataLoader``.
        seed: With the epoch it decides the order; the same on every rank.
        drop_last: On several ranks, whether the last samples are left out, or some repeated, so that every rank has as
            many.
        num_replicas: Ranks that see different data; None asks ``torch.distributed`` when an epoch starts. Write it
            where ranks share samples (tensor parallelism).
        rank: This one of them.

    Raises:
        ConfigurationError: If an argument is wrong.

    Example:
        >>> from lightning_memsave import LengthGroupedSampler
        >>> sampler = LengthGroupedSampler([7, 1, 7, 1, 7, 1, 7, 1], batch_size=2)
        >>> sorted(sampler), next(iter(sampler)) in {0, 2, 4, 6}
        ([0, 1, 2, 3, 4, 5, 6, 7], True)

    Source:
        Sorting within pools: Khomenko et al. 2016, https://arxiv.org/abs/1708.05604.

    """

    def __init__(
        self,
        lengths: Any,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        # Not DistributedSampler.__init__, which wants the process group now: loaders are often made before it.
        problems = []
        if batch_size < 1:
            problems.append(f"batch_size={batch_size!r}: write the batch_size of the DataLoader, at least 1.")
        if (num_replicas is None) != (rank is None):
            problems.append(f"num_replicas={num_replicas}, rank={rank}: write both or neither.")
        elif num_replicas is not None and rank is not None and not 0 <= rank < num_replicas:
            problems.append(f"num_replicas={num_replicas}, rank={rank}: write 0 <= rank < num_replicas.")
        raise_problems("LengthGroupedSampler", problems)
        self.lengths = _lengths(lengths)
        raise_problems("LengthGroupedSampler", [] if len(self.lengths) else ["there are no samples."])
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self._place = None if num_replicas is None or rank is None else (num_replicas, rank)

    def _replicas(self) -> tuple[int, int]:
        if self._place is not None:
            return self._place
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0

    def _order(self, ranks: int) -> Tensor:
        """Return the permutation of this epoch; batches of ``batch_size * ranks``, the last one may be smaller."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        batch = self.batch_size * ranks
        count = len(self.lengths)
        shuffled = torch.randperm(count, generator=generator)
        whole = count // batch
        pool_batches = max(1, min(_POOL_BATCHES, whole // 2))
        # What is left over belongs to the last pool: its batch, smaller than the others, then has short samples.
        pool = (torch.arange(count) // (batch * pool_batches)).clamp(max=max(0, whole // pool_batches - 1))
        lengths = self.lengths[shuffled]
        # One stable sort for all pools: by pool, then longest first.
        longest = int(lengths.max())
        order = shuffled[torch.argsort(pool * (longest + 1) + longest - lengths, stable=True)]
        batches = order[: whole * batch].view(whole, batch)[torch.randperm(whole, generator=generator)]
        if whole:
            first = int(torch.argmax(self.lengths[batches].amax(1)))
            batches[[0, first]] = batches[[first, 0]]
        return torch.cat([batches.flatten(), order[whole * batch :]])

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's samples of the epoch."""
        ranks, rank = self._replicas()
        order = self._order(ranks)
        spare = len(order) % ranks
        if spare and self.drop_last:
            order = order[:-spare]
        elif spare:
            order = torch.cat([order, order.repeat(ranks)[: ranks - spare]])
        # Neighbours have similar lengths, and go to different ranks at the same time.
        return iter(order[rank::ranks].tolist())

    def __len__(self) -> int:
        """Return the number of samples of this rank."""
        ranks, _ = self._replicas()
        return len(self.lengths) // ranks if self.drop_last else -(-len(self.lengths) // ranks)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it."""
        self.epoch = epoch

    def padding_share(self) -> float:
        """Return the share of padding in this epoch's batches, each padded to its longest sample."""
        ranks, _ = self._replicas()
        lengths = self.lengths[self._order(ranks)]
        parts = [group[rank::ranks] for group in torch.split(lengths, self.batch_size * ranks) for rank in range(ranks)]
        held = sum(len(part) * int(part.max()) for part in parts if len(part))
        return 1 - int(lengths.sum()) / max(held, 1)


def _lengths(lengths: Any) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths.to(torch.int64).cpu().flatten()
    if not hasattr(lengths, "__len__") or (len(lengths) and isinstance(lengths[0], Mapping)):
        return sample_lengths(lengths, "LengthGroupedSampler")
    return torch.tensor(list(lengths), dtype=torch.int64).flatten()
