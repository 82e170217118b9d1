"""bf16 weights and their corrections: exact bounds, every corner of the number format, no whole fp32 copy."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn

from lightning_memsave.optim.split_weights import (
    BLOCK,
    attach_correction,
    correction_of,
    draw_correction,
    join,
    split,
    split_into,
    take_correction,
)

DTYPES = [torch.int8, torch.int16]
# steps of the fp32 pattern that a join may be away from what was split
BOUND = {torch.int8: 129, torch.int16: 1}
# the same relative to a normal number, whose smallest pattern in a binade is 2 ** 23
RELATIVE = {torch.int8: 129 / 2**23, torch.int16: 1 / 2**23}


def every_weight(rests: list[int]) -> Tensor:
    """Return fp32 values around every finite bf16 weight: its pattern plus each of the rests."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).bitwise_left_shift(16)
    weights = patterns[patterns.view(torch.float32).isfinite()]
    return (weights[:, None] + torch.tensor(rests, dtype=torch.int32)).flatten().view(torch.float32)


RESTS = [-32768, -32767, -32640, -129, -128, -1, 0, 1, 128, 129, 257, 12345, 32639, 32640, 32767]


@pytest.mark.parametrize("dtype", DTYPES)
def test_joining_a_split_is_within_its_bound_for_every_weight(dtype) -> None:
    values = every_weight(RESTS)
    weight, correction = split(values, dtype)
    joined = join(weight, correction)
    kept = values.isfinite() & weight.isfinite()
    steps = (joined.view(torch.int32).long() - values.view(torch.int32).long()).abs()[kept]
    assert steps.max() == BOUND[dtype]
    normal = kept & (values.abs() >= torch.finfo(torch.float32).tiny)
    error = (joined.double() - values.double()).abs() / values.double().abs()
    # 1.54e-5 and 1.2e-7; bf16 alone is 3.9e-3 away
    assert error[normal].max() <= RELATIVE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_what_torch_rounds_to_and_joining_never_leaves_its_cell(dtype) -> None:
    values = every_weight(RESTS)
    weight, correction = split(values, dtype)
    finite = weight.isfinite()
    assert torch.equal(weight.view(torch.int16), values.to(torch.bfloat16).view(torch.int16))
    joined = join(weight, correction)
    assert torch.equal(joined.to(torch.bfloat16)[finite], weight[finite])
    again = split(joined, dtype)
    assert torch.equal(again[0].view(torch.int16)[finite], weight.view(torch.int16)[finite])
    assert torch.equal(again[1][finite], correction[finite])


def test_a_split_by_chance_is_right_on_average_and_never_moves_what_it_can_hold() -> None:
    rests = torch.arange(-32768, 32768, dtype=torch.int32)
    values = (rests + 0x3F800000).view(torch.float32)
    weight, correction = (torch.empty(values.shape, dtype=dtype) for dtype in (torch.bfloat16, torch.int8))
    nearest = join(*split(values))
    total = torch.zeros_like(values, dtype=torch.float64)
    for step in range(1, 401):
        split_into(values, weight, correction, step)
        joined = join(weight, correction)
        steps = (joined.view(torch.int32) - values.view(torch.int32)).abs()
        assert torch.equal(joined.to(torch.bfloat16), weight)
        inside = (values.view(torch.int32) - weight.float().view(torch.int32)).abs() <= 32639
        assert steps[inside].max() <= 256
        assert steps.max() <= 257 + 129
        total += joined.double()
        split_into(nearest, weight, correction, step)
        assert torch.equal(join(weight, correction), nearest)
    error = (total / 400 - values.double())[inside] / 2.0**-23
    # of one value: 257 / 2 / sqrt(400) = 6.4 steps; of the mean over 65 thousand values: 0.03
    assert error.mean().abs() < 0.5
    assert error.abs().max() < 45


def test_sixteen_bits_are_exact_but_on_ties() -> None:
    values = torch.randint(-(2**31), 2**31, (2**20,)).to(torch.int32).view(torch.float32)
    values = values[values.isfinite() & values.to(torch.bfloat16).isfinite()]
    tie = values.view(torch.int32).bitwise_and(0xFFFF) == 0x8000
    joined = join(*split(values, torch.int16))
    assert torch.equal(joined[~tie].view(torch.int32), values[~tie].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_denormals_infinities_and_nan(dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-40, torch.nan])
    weight, correction = split(special, dtype)
    joined = join(weight, correction)
    assert joined[-1].isnan()
    assert weight[-1].isnan()
    assert torch.equal(joined[:4].view(torch.int32), special[:4].view(torch.int32))  # the sign of zero too
    steps = (joined.view(torch.int32) - special.view(torch.int32)).abs()[4:6]
    assert steps.max() <= BOUND[dtype]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (BLOCK + 3,), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_strides_are_kept(shape, dtype) -> None:
    values = torch.randn(shape)
    made = [values, values.to(memory_format=torch.channels_last)] if values.ndim == 4 else [values]
    for value in [*made, *([values.t()] if values.ndim == 2 else [])]:
        weight, correction = split(value, dtype)
        assert weight.shape == correction.shape == value.shape
        assert weight.stride() == value.stride()
        assert torch.equal(weight, value.to(torch.bfloat16))
        torch.testing.assert_close(join(weight, correction), value, rtol=RELATIVE[dtype], atol=0)


def test_no_whole_fp32_copy_appears() -> None:
    values = torch.randn(8 * BLOCK)
    with LiveBytes() as live:
        weight, correction = split(values)
    results = weight.nbytes + correction.nbytes
    # the temporaries of a block: three int32 tensors
    assert live.peak - results <= 4 * 4 * BLOCK


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_drawn_correction_is_uniform_in_the_cell(dtype) -> None:
    weight = torch.full((100_000,), 1.5, dtype=torch.bfloat16)
    state = torch.get_rng_state()
    drawn = draw_correction(weight, dtype, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers were used"
    joined = join(weight, drawn)
    assert torch.equal(joined.to(torch.bfloat16), weight)
    half_cell = 2.0**-8  # of weights from 1 to 2
    place = (joined - 1.5) / half_cell
    assert place.abs().max() <= 1
    # standard error of the mean 1.8e-3, of the mean square 9.4e-4
    assert place.mean().abs() < 8e-3
    assert (place.square().mean() - 1 / 3).abs() < 5e-3
    assert torch.equal(drawn, draw_correction(weight, dtype, torch.Generator().manual_seed(0)))


def test_a_correction_waits_with_its_parameter() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    correction = torch.ones(2, 3, dtype=torch.int8)
    attach_correction(layer.weight, correction)
    layer.to("cpu")
    layer.train()
    assert correction_of(layer.weight) is correction
    assert not hasattr(copy.deepcopy(layer).weight, "_memsave_correction")
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)) == {"weight", "bias"}
    assert take_correction(layer.weight) is correction
    assert correction_of(layer.weight) is None


def test_a_correction_of_other_weights_is_forgotten() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    attach_correction(layer.weight, torch.ones(2, 3, dtype=torch.int8))
    layer.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    assert correction_of(layer.weight) is None
    assert take_correction(layer.weight) is None


def test_moving_the_storage_is_not_a_change_of_the_weights() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    attach_correction(layer.weight, torch.ones(2, 3, dtype=torch.int8))
    layer.weight.data = layer.weight.data.clone()  # what Module.to(device) does
    assert correction_of(layer.weight) is not None
