"""Copies on all ranks become those of rank zero, bit by bit, whatever they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memsave.parallel import same_state
from lightning_memsave.parallel.same_state import broadcast_tensors, state_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.int64)


def _dtypes(rank: int, buffer_bytes: int) -> list[Tensor]:
    same_state._BUFFER_BYTES = buffer_bytes
    generator = torch.Generator().manual_seed(rank)
    made = [(torch.rand(3, 5, generator=generator) * 9 - 4).to(dtype) for dtype in DTYPES]
    made += [made[0].new_tensor(float(rank)), torch.empty(0), torch.full((4,), float(rank))[None].expand(3, 4)]
    made += [torch.randn(4, 6, generator=generator).t(), torch.randn(2, 3, 4, 4, generator=generator)[:, 1:]]
    broadcast_tensors(made)
    return [t.clone() for t in made]


@pytest.mark.parametrize("buffer_bytes", [1, 64, 1 << 20])
def test_every_dtype_and_layout_arrives_bit_by_bit(buffer_bytes: int, ranks: Callable[..., list[Any]]) -> None:
    first, second = ranks(_dtypes, buffer_bytes)
    assert len(first) == 12
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    assert float(second[7]) == 0.0


def test_a_modules_state_leaves_out_what_is_ignored_and_counts_shared_tensors_once() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    assert len(state_tensors(module)) == 8
    assert len(state_tensors(module, ["0.bias", "1.running_mean"])) == 6
