"""Put pieces of known lengths into bins of one capacity. Every function returns the bin of each piece."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["STRATEGIES", "assign_bins"]

# N = pieces. Lengths are in 1..capacity.


def best_fit(lengths: Tensor, capacity: int) -> Tensor:
    """Best fit decreasing: each piece into the fullest bin that has room, longest pieces first.

    O(N log N) for the sort, and at most one look-up per piece: pieces of one length that go into the same bin go at
    once. The bins of each remaining room are stacks, and one integer has a bit for every room that occurs, so the
    smallest sufficient room is its lowest set bit.

    Source:
        Johnson et al. 1974, https://doi.org/10.1137/0203025; for language models: Ding et al. 2024,
        https://arxiv.org/abs/2404.10830.

    """
    order = torch.argsort(lengths, descending=True, stable=True)
    values, counts = torch.unique_consecutive(lengths[order], return_counts=True)
    stacks: dict[int, list[int]] = {}
    rooms = 0
    runs: list[tuple[int, int]] = []
    num_bins = 0
    for length, left in zip(values.tolist(), counts.tolist()):
        while left:
            sufficient = rooms >> length
            if sufficient:
                room = length + (sufficient & -sufficient).bit_length() - 1
                stack = stacks[room]
                chosen = stack.pop()
                if not stack:
                    rooms ^= 1 << room
            else:
                room, chosen = capacity, num_bins
                num_bins += 1
            taken = min(left, room // length)
            left -= taken
            room -= taken * length
            runs.append((chosen, taken))
            if room:
                stacks.setdefault(room, []).append(chosen)
                rooms |= 1 << room
    chosen_runs, repeats = torch.tensor(runs, dtype=torch.int64).unbind(1)
    bins = torch.empty_like(order)
    bins[order] = torch.repeat_interleave(chosen_runs, repeats)
    return bins


def first_fit(lengths: Tensor, capacity: int) -> Tensor:
    """First fit in the given order: each piece into the oldest bin that has room; O(N log N) by a tree of maxima.

    A bin per piece stands in the tree from the start, empty, so the first one that was never used is a new bin.
    """
    size = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * size)
    chosen = []
    for length in lengths.tolist():
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        chosen.append(node - size)
        room[node] -= length
        while node > 1:
            node //= 2
            larger = max(room[2 * node], room[2 * node + 1])
            if room[node] == larger:
                break
            room[node] = larger
    return torch.tensor(chosen, dtype=torch.int64)


def sequential(lengths: Tensor, capacity: int) -> Tensor:
    """Next fit in the given order: a piece that does not fit into the last bin opens a new one."""
    chosen = []
    current, room = -1, 0
    for length in lengths.tolist():
        if length > room:
            current, room = current + 1, capacity
        room -= length
        chosen.append(current)
    return torch.tensor(chosen, dtype=torch.int64)


STRATEGIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "best_fit": best_fit,
    "first_fit": first_fit,
    "sequential": sequential,
}


def assign_bins(lengths: Tensor, capacity: int, strategy: str) -> tuple[Tensor, Tensor]:
    """Pack, and return the bins as two flat tensors.

    Bins are in the order of their first piece, so that an unshuffled run does not see the longest pieces first; pieces
    in a bin keep their order.

    Args:
        lengths: ``(N,)`` int64, each in 1..capacity, at least one.
        capacity: Room of a bin.
        strategy: A key of ``STRATEGIES``.

    Returns:
        ``(pieces, offsets)``: bin ``i`` holds ``pieces[offsets[i] : offsets[i + 1]]``; int64, 8 bytes a piece and
        8 bytes a bin.

    """
    bins = STRATEGIES[strategy](lengths, capacity)
    num_bins = int(bins.max()) + 1
    index = torch.arange(len(bins))
    first = torch.full((num_bins,), len(bins)).scatter_reduce(0, bins, index, "amin")
    rank = torch.empty_like(first)
    rank[torch.argsort(first)] = torch.arange(num_bins)
    renamed = rank[bins]
    pieces = torch.argsort(renamed, stable=True)
    offsets = torch.zeros(num_bins + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(renamed, minlength=num_bins), 0, out=offsets[1:])
    return pieces, offsets
