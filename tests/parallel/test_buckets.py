"""Buckets: a fixed order, one dtype each, never larger than asked."""

from __future__ import annotations

import torch
from torch import nn

from lightning_memsave.parallel.buckets import is_dense, make_buckets, same_shaped


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


def test_buckets_follow_the_order_and_keep_the_size() -> None:
    found = make_buckets(parameters(3, 3, 3, 3, 3), [4, 2, 0, 1, 3], bucket_bytes=25)
    assert [bucket.indices for bucket in found] == [(4, 2), (0, 1), (3,)]
    assert all(bucket.num_values * 4 <= 25 for bucket in found)


def test_every_parameter_is_in_one_bucket_whatever_the_size() -> None:
    owned = parameters(*range(1, 30))
    for size in (1, 50, 10_000):
        found = make_buckets(owned, range(len(owned)), bucket_bytes=size)
        assert sorted(index for bucket in found for index in bucket.indices) == list(range(29))


def test_a_gradient_as_large_as_a_bucket_is_alone_and_does_not_close_the_one_that_fills() -> None:
    found = make_buckets(parameters(1, 100, 1), [0, 1, 2], bucket_bytes=40)
    assert [bucket.indices for bucket in found] == [(1,), (0, 2)]
    assert found[0].alone


def test_dtypes_are_not_mixed_and_a_bucket_stands_where_its_last_gradient_is_expected() -> None:
    norms, weights = parameters(2, 2, 2), parameters(8, 8, 8, dtype=torch.bfloat16)
    mixed = [p for pair in zip(norms, weights, strict=True) for p in pair]
    found = make_buckets(mixed, range(6), bucket_bytes=33)
    assert [(bucket.indices, bucket.dtype) for bucket in found] == [
        ((1, 3), torch.bfloat16),
        ((0, 2, 4), torch.float32),
        ((5,), torch.bfloat16),
    ]


def test_a_part_of_a_buffer_has_the_layout_of_the_parameter() -> None:
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    view = same_shaped(torch.zeros(100)[2 : 2 + weight.numel()], weight)
    assert view.stride() == weight.stride()
    view.copy_(weight)
    assert torch.equal(view, weight)
    assert not is_dense(torch.zeros(4, 4)[:, :2])
    assert not is_dense(torch.zeros(1, 4).expand(3, 4))
    assert same_shaped(torch.zeros(8), torch.zeros(4, 4)[:, :2]).is_contiguous()
