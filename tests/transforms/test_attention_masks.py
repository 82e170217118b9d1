"""Which masks hide nothing or only the future: never a wrong answer, and each mask read once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_memsave.transforms import _attention_masks
from lightning_memsave.transforms._attention_masks import MaskReader

TOKENS = 12
TRIL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def as_float(mask: Tensor, low: float = -math.inf, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)


def meaning(mask: Tensor) -> Tensor:
    """Which keys a query sees, by the definition."""
    if mask.dtype == torch.bool:
        return mask.expand(*mask.shape[:-2], TOKENS, TOKENS)
    return (mask == 0).expand(*mask.shape[:-2], TOKENS, TOKENS)


NOTHING = {
    "bool": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool),
    "keys only": torch.ones(2, 1, 1, TOKENS, dtype=torch.bool),
    "expanded": torch.ones(1, 1, dtype=torch.bool).expand(TOKENS, TOKENS),
    "expanded over queries": torch.ones(2, 1, 1, TOKENS, dtype=torch.bool).expand(2, 1, TOKENS, TOKENS),
    "float": torch.zeros(2, 1, 1, TOKENS),
    "bf16": torch.zeros(TOKENS, TOKENS, dtype=torch.bfloat16),
    "negative zero": -torch.zeros(TOKENS, TOKENS),
}
CAUSAL = {
    "bool": TRIL,
    "bool, a batch of them": TRIL.repeat(2, 3, 1, 1),
    "expanded": TRIL.expand(2, 3, TOKENS, TOKENS),
    "float": as_float(TRIL),
    "lowest fp32": as_float(TRIL, torch.finfo(torch.float32).min),
    "lowest bf16": as_float(TRIL, torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "fp16": as_float(TRIL, -math.inf, torch.float16),
}
DENSE = {
    "one hidden": torch.ones(TOKENS, TOKENS, dtype=torch.bool).index_put(
        (torch.tensor(5), torch.tensor(7)), TRIL[0, 1]
    ),
    "one row sees too much": TRIL.index_put((torch.tensor(4), torch.tensor(9)), TRIL[0, 0]),
    "one row sees too little": TRIL.index_put((torch.tensor(9), torch.tensor(4)), TRIL[0, 1]),
    "strictly below": TRIL.tril(-1),
    "one further": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(1),
    "window": TRIL & ~TRIL.tril(-4),
    "the future": TRIL.T,
    "second batch only": torch.stack([TRIL, TRIL & ~TRIL.tril(-4)])[:, None],
    "bias": torch.full((TOKENS, TOKENS), 0.5),
    "causal with a bias": as_float(TRIL) + 0.5 * TRIL,
    "low, but not low enough": as_float(TRIL, -100.0),
    "fp16, low": as_float(TRIL, torch.finfo(torch.float16).min, torch.float16),
    "nan": torch.full((TOKENS, TOKENS), math.nan),
    "nothing seen": torch.zeros(TOKENS, TOKENS, dtype=torch.bool),
    "8 bits": torch.zeros(TOKENS, TOKENS, dtype=torch.uint8),
    "one value": torch.ones((), dtype=torch.bool),
    "learned": torch.zeros(TOKENS, TOKENS, requires_grad=True),
}
EVERY = [(kind, name) for kind, masks in (("none", NOTHING), ("causal", CAUSAL), ("dense", DENSE)) for name in masks]


@pytest.mark.parametrize("chunk", [2**22, 24], ids=["whole", "chunks"])
@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_mask_is_read_for_what_it_says(kind, name, chunk, monkeypatch):
    monkeypatch.setattr(_attention_masks, "_CHUNK", chunk)
    mask = {"none": NOTHING, "causal": CAUSAL, "dense": DENSE}[kind][name]
    assert MaskReader().read(mask, TOKENS, TOKENS) == kind


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_true_hides_where_it_is_asked_for(kind, name):
    mask = {"none": NOTHING, "causal": CAUSAL, "dense": DENSE}[kind][name]
    if mask.dtype == torch.bool:
        mask = ~mask
    assert MaskReader().read(mask, TOKENS, TOKENS, true_hides=True) == kind


def test_no_random_mask_is_ever_taken_for_something_else():
    generator = torch.Generator().manual_seed(0)
    found = {"none": 0, "causal": 0, "dense": 0}
    for _ in range(300):
        mask = (TRIL if torch.rand((), generator=generator) < 0.5 else torch.ones_like(TRIL)).repeat(2, 1, 1, 1)
        flips = int(torch.randint(0, 3, (), generator=generator))
        for _ in range(flips):
            at = [int(torch.randint(0, size, (), generator=generator)) for size in mask.shape]
            mask[tuple(at)] = ~mask[tuple(at)]
        kind = MaskReader().read(mask, TOKENS, TOKENS)
        found[kind] += 1
        expected = {"none": torch.ones_like(TRIL), "causal": TRIL}.get(kind)
        if expected is None:
            assert not meaning(mask).all()
            assert not (meaning(mask) == TRIL).all()
        else:
            assert (meaning(mask) == expected).all()
    assert all(found.values())


def test_a_causal_mask_counts_only_for_as_many_keys_as_queries():
    assert MaskReader().read(torch.ones(3, 5, dtype=torch.bool).tril(), 3, 5) == "dense"
    assert MaskReader().read(torch.ones(3, 5, dtype=torch.bool), 3, 5) == "none"


def test_a_mask_and_its_views_are_read_once_until_it_is_written_to():
    reader, mask = MaskReader(), torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    assert [reader.read(mask[:, :, :, :TOKENS], TOKENS, TOKENS) for _ in range(4)] == ["none"] * 4
    assert reader.reads == 1
    mask[1, 0, 3, 5] = False
    assert reader.read(mask[:, :, :, :TOKENS], TOKENS, TOKENS) == "dense"
    assert reader.reads == 2


def test_a_mask_at_the_address_of_a_dead_one_is_read():
    reader = MaskReader()
    assert reader.read(torch.ones(TOKENS, TOKENS, dtype=torch.bool), TOKENS, TOKENS) == "none"
    assert reader.read(torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), TOKENS, TOKENS) == "causal"
    assert not list(reader._known)


def test_a_write_that_no_version_shows_counts_after_clear():
    reader, mask = MaskReader(), torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    assert reader.read(mask, TOKENS, TOKENS) == "none"
    mask.data[3, 4] = False
    reader.clear()
    assert reader.read(mask, TOKENS, TOKENS) == "dense"


def test_inference_tensors_have_no_version_and_are_read_every_time():
    with torch.inference_mode():
        reader, mask = MaskReader(), torch.ones(TOKENS, TOKENS, dtype=torch.bool)
        assert reader.read(mask, TOKENS, TOKENS) == "none"
        mask[0, 1] = False
        assert reader.read(mask, TOKENS, TOKENS) == "dense"


def test_values_that_are_not_there_are_not_guessed():
    assert MaskReader().read(torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="meta"), TOKENS, TOKENS) == "dense"
