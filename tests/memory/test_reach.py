"""Batches of any kind, and tensors of any kind."""

from __future__ import annotations

import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass

import torch
from torch import nn

from lightning_memsave.memory._reach import storages, tensors_in

A, B, C = torch.zeros(1), torch.zeros(2), torch.zeros(3)


@dataclass
class Dataclass:
    x: torch.Tensor
    rest: object = None


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Graph:
    """Tensors behind a store object, as graph libraries keep them, with a reference back."""

    def __init__(self, x):
        self._store = Dataclass(x, {"edges": B})
        self._store.parent = self


def sizes(value, **kwargs):
    return sorted(t.numel() for t in tensors_in(value, **kwargs))


def test_containers_of_any_depth_are_entered():
    pair = namedtuple("Pair", "a b")
    assert sizes([A, (B, {"c": [C]})]) == [1, 2, 3]
    assert sizes(pair(A, B)) == [1, 2]
    assert sizes(UserDict(x=A)) == [1]
    assert sizes({1: None, 2: "text", 3: 4.0}) == []


def test_objects_that_hold_tensors_are_entered():
    assert sizes(Dataclass(A, Slots(B))) == [1, 2]
    assert sizes(Graph(A)) == [1, 2]


def test_an_object_is_visited_once():
    loop = [A]
    loop.append(loop)
    assert sizes(loop) == [1]
    assert sizes([A, A]) == [1]


def test_modules_optimizers_and_functions_are_not_batches():
    model = nn.Linear(2, 2)
    assert sizes([model, torch.optim.SGD(model.parameters(), lr=1.0), lambda: A]) == []


def test_long_lists_of_numbers_are_skipped_and_what_follows_is_found():
    class Numbers(list):
        def __iter__(self):
            yield 0
            raise AssertionError("walked through a long list of numbers")

    assert sizes([Numbers(range(10**6)), A]) == [1]


def test_custom_objects_can_be_left_out():
    assert sizes([A, Dataclass(B)], enter=lambda item: False) == [1]


def test_sparse_tensors_stand_on_their_parts():
    coo = torch.eye(3).to_sparse()
    assert sum(s.nbytes() for s, _ in storages(coo)) == 3 * 2 * 8 + 3 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout beta
        csr = torch.sparse_csr_tensor(torch.arange(4), torch.arange(3), torch.ones(3), (3, 3))
    assert sum(s.nbytes() for s, _ in storages(csr)) == 4 * 8 + 3 * 8 + 3 * 4


def test_nested_tensors_are_unwrapped():
    nested = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=torch.jagged)
    assert sum(s.nbytes() for s, _ in storages(nested)) >= 5 * 4 * 4
