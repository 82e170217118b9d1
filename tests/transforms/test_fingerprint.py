"""Content hashes of weights: what they notice, and what they do not depend on."""

from __future__ import annotations

import pytest
import torch

from lightning_memsave.transforms.fingerprint import (
    compare,
    content_hash,
    fingerprint,
    logical_shape,
    sample_hash,
    weight_kind,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.bool]


def values(dtype: torch.dtype, size: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (size,), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_element_and_two_swapped_ones_are_noticed(dtype: torch.dtype) -> None:
    x = values(dtype)
    changed, swapped = x.clone(), x.clone()
    changed[7] = 1 - changed[7].int()
    other = int((x.int() != x[0].int()).nonzero()[0])
    swapped[[0, other]] = swapped[[other, 0]]
    assert len({content_hash(x), content_hash(changed), content_hash(swapped)}) == 3


def test_it_depends_on_the_values_and_not_on_their_layout() -> None:
    x = values(torch.float32).view(30, 100)
    assert content_hash(x) == content_hash(x.t().contiguous().t())
    assert content_hash(x) != content_hash(x.t())


def test_chunks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memsave.transforms import fingerprint as module

    x = torch.randn(10_001)
    expected = content_hash(x)
    integers = x.view(torch.int32).tolist()
    assert int(expected, 16) == sum(v * (2 * i + 1) for i, v in enumerate(integers)) % 2**64
    monkeypatch.setattr(module, "_CHUNK", 1000)
    assert content_hash(x) == expected


def test_meta_tensors_and_empty_ones_have_a_defined_answer() -> None:
    assert content_hash(torch.empty(3, device="meta")) is None
    assert content_hash(torch.empty(0)) == "0" * 16
    assert sample_hash(torch.empty(3, device="meta")) == sample_hash(torch.empty(0)) == 0


def test_the_sample_reads_at_most_65536_elements() -> None:
    x = torch.zeros(2**17 + 2)
    before = sample_hash(x)
    x[1] = 1  # between two samples, three elements apart
    assert sample_hash(x) == before
    x[3] = 1
    assert sample_hash(x) != before


def test_a_wider_weight_is_rounded_before_it_is_compared() -> None:
    x = torch.randn(100)
    saved = fingerprint(x.bfloat16(), content_hash(x.bfloat16()))
    assert compare(saved, x) == "equal"
    assert compare(saved, x * 2) == "content"
    assert compare(fingerprint(x, content_hash(x)), x.bfloat16()) == "kind"
    assert compare(saved, x[:50]) == "shape"


def test_quantized_weights_keep_their_logical_shape_and_say_how_they_are_stored() -> None:
    import bitsandbytes as bnb

    weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4").to("cpu")
    assert weight_kind(weight) == "nf4-64-double"
    assert logical_shape(weight) == [64, 128]
    saved = fingerprint(weight, content_hash(weight))
    assert compare(saved, weight) == "equal"
    assert compare(saved, torch.randn(64, 128)) == "kind"
    assert compare({**saved, "device": "cuda", "content": "0" * 16}, weight) == "kind"


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.complex128]
)
def test_reading_a_weight_changes_no_value(dtype):
    weight = torch.randn(40).to(dtype)
    before = weight.clone()
    first = content_hash(weight), sample_hash(weight)
    assert torch.equal(weight, before)
    assert first == (content_hash(weight), sample_hash(weight))
