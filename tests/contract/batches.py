"""The containers that real projects put their batches in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader


@dataclass
class Row:
    """A batch that is a dataclass."""

    numbers: Tensor
    categories: Tensor
    target: Tensor


class Graph:
    """A batch that is an object with tensor attributes and ``to``, as graph libraries make them."""

    def __init__(self, nodes: Tensor, edges: Tensor, target: Tensor) -> None:
        self.nodes, self.edges, self.target = nodes, edges, target

    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        return Graph(*(t.to(device, non_blocking=non_blocking) for t in (self.nodes, self.edges, self.target)))


class TensorMapping(Mapping):
    """A batch that is a mapping of its own, with a batch size and ``to``, like a TensorDict."""

    def __init__(self, tensors: dict[str, Tensor], batch_size: int) -> None:
        self._tensors, self.batch_size = tensors, batch_size

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to(self, device: Any, non_blocking: bool = False) -> TensorMapping:
        moved = {k: t.to(device, non_blocking=non_blocking) for k, t in self._tensors.items()}
        return TensorMapping(moved, self.batch_size)


def as_it_is(batch: Any) -> Any:
    return batch


def loader(batches: list[Any]) -> DataLoader:
    """Serve ready-made batches in order."""
    return DataLoader(batches, batch_size=None, collate_fn=as_it_is)


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator, so that every run sees the same data."""
    return torch.Generator().manual_seed(seed)
