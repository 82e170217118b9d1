"""Each rule is that of its paper: beside a reference, or step by step in plain arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memsave._imports import require
from lightning_memsave.optim import per_parameter
from lightning_memsave.optim._codecs import FOUR_BITS, FP8, dynamic_table
from lightning_memsave.optim.adafactor import Adafactor, AdaLomo
from lightning_memsave.optim.adam_mini import AdamMini
from lightning_memsave.optim.adamw_narrow import AdamW4bit, AdamWFp8
from lightning_memsave.optim.apollo import ApolloAdamW
from lightning_memsave.optim.came import CAME
from lightning_memsave.optim.galore import GaLoreAdamW
from lightning_memsave.optim.muon import Muon, orthogonalized

STEPS = 25


@pytest.fixture(autouse=True, params=[2**20, 512], ids=["whole", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every rule on whole tensors and on blocks of them."""
    monkeypatch.setattr(per_parameter, "_BLOCK_ON_CPU", request.param)


def twins(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(1)
    first = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return first, [nn.Parameter(p.detach().clone()) for p in first]


def train(parameters: list[Any], optimizer: torch.optim.Optimizer, num_steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(num_steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def worst(a: list[Any], b: list[Any]) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


# -- Adafactor ---------------------------------------------------------------------------------------------------------
SHAPES = ((64, 80), (90, 20), (8, 6, 3, 3), (33,), (), (1, 700))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"beta1": 0.9}, {"scale_parameter": True}, {"decay_rate": -0.5, "clip_threshold": 0.5}],
)
def test_adafactor_is_that_of_transformers(options, dtype) -> None:
    theirs = require("transformers.optimization", "this test").Adafactor
    ours, reference = twins(*SHAPES, dtype=dtype)
    train(ours, Adafactor(ours, lr=1e-2, **options))
    fixed = {"relative_step": False, "warmup_init": False, "scale_parameter": False}
    train(reference, theirs(reference, lr=1e-2, **{**fixed, **options}))
    # worst seen: 2.1e-6 with beta1, 2.4e-7 without; in bf16 1.3e-4, where one small value was rounded the other way
    assert worst(ours, reference) < (5e-6 if dtype == torch.float32 else 1e-3)


def test_adafactor_with_scaled_steps_is_near_that_of_torch() -> None:
    ours, reference = twins((64, 80), (33,))
    train(ours, Adafactor(ours, lr=1e-2, scale_parameter=True))
    train(reference, torch.optim.Adafactor(reference, lr=1e-2, weight_decay=0.0))
    # torch's rate is also at most 1/sqrt(step), which is larger here; worst seen: 4.8e-7
    assert worst(ours, reference) < 5e-6


def test_adalomo_is_adafactor_with_scaled_steps() -> None:
    ours, reference = twins(*SHAPES)
    train(ours, AdaLomo(ours, lr=1e-2, weight_decay=0.1))
    train(reference, Adafactor(reference, lr=1e-2, weight_decay=0.1, scale_parameter=True))
    assert worst(ours, reference) == 0.0


# -- CAME --------------------------------------------------------------------------------------------------------------
def _root(row: Tensor, col: Tensor) -> Tensor:
    return ((row.unsqueeze(-1) * col.unsqueeze(-2)) / row.mean(-1, keepdim=True).unsqueeze(-1)).sqrt()


def test_came_is_that_of_the_paper() -> None:
    [weight], [p] = twins((40, 30))
    train([weight], CAME([weight], lr=1e-2, weight_decay=0.1))
    w = p.detach().double()
    row, col, first = torch.zeros(40).double(), torch.zeros(30).double(), torch.zeros_like(w)
    unsteady_row, unsteady_col = torch.zeros_like(row), torch.zeros_like(col)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        g = torch.randn(p.shape, generator=generator).double()
        row = 0.999 * row + 0.001 * (g**2 + 1e-30).mean(-1)
        col = 0.999 * col + 0.001 * (g**2 + 1e-30).mean(-2)
        u = g / _root(row, col)
        u = u / max(1.0, u.square().mean().sqrt().item())
        first = 0.9 * first + 0.1 * u
        unsteady = (u - first) ** 2 + 1e-16
        unsteady_row = 0.9999 * unsteady_row + 0.0001 * unsteady.mean(-1)
        unsteady_col = 0.9999 * unsteady_col + 0.0001 * unsteady.mean(-2)
        w = w * (1 - 1e-2 * 0.1) - 1e-2 * first / _root(unsteady_row, unsteady_col)
    # worst seen: 2.4e-6
    assert (weight - w).abs().max() < 1e-5


def test_came_of_a_vector_has_no_unsteadiness() -> None:
    vector = nn.Parameter(torch.ones(4))
    vector.grad = torch.tensor([1.0, -1.0, 2.0, 0.0])
    CAME([vector], lr=0.1).step()
    # the gradient over its root is (1, -1, 1, 0) / sqrt(0.001), clipped to a mean square of 1; a tenth of it moves
    torch.testing.assert_close(vector.detach(), 1 - 0.01 * math.sqrt(4 / 3) * torch.tensor([1.0, -1.0, 1.0, 0.0]))


# -- Adam-mini ---------------------------------------------------------------------------------------------------------
def test_adam_mini_is_adamw_where_a_row_is_one_value() -> None:
    ours, reference = twins((50, 1), (33,), ())
    train(ours, AdamMini(ours, lr=1e-2, weight_decay=0.1))
    train(reference, torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.1))
    # worst seen: 6e-8
    assert worst(ours, reference) < 1e-6


def test_adam_mini_divides_a_row_by_its_own_mean_square() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.tensor([[3.0, 4.0], [0.5, 0.0]])
    AdamMini([weight], lr=0.1, weight_decay=0.0).step()
    rows = torch.tensor([[12.5], [0.125]]).sqrt()
    torch.testing.assert_close(weight.detach(), -0.1 * weight.grad / rows)


# -- narrow AdamW ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("cls", "tolerance"), [(AdamW4bit, 0.13), (AdamWFp8, 0.03)])
def test_narrow_moments_follow_adamw(cls, tolerance) -> None:
    ours, reference = twins((64, 80), (33,))
    train(ours, cls(ours, lr=1e-2, weight_decay=0.1))
    train(reference, torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.1))
    # 25 steps of 1e-2 on noise; worst seen: 6.5e-2 in 4 bits, 1.6e-2 in fp8
    assert worst(ours, reference) < tolerance
    assert (ours[1] - reference[1]).abs().max() < 2e-6  # a small tensor keeps fp32 moments


def test_the_four_bit_table_is_that_of_the_paper() -> None:
    table = dynamic_table(4)
    assert len(table) == 16
    assert table[8:] == [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]


@pytest.mark.parametrize("num_values", [256, 300, 301])
@pytest.mark.parametrize(("codec", "error"), [(FOUR_BITS, 0.1126), (FP8, 1 / 28)])
def test_what_is_written_is_read_to_within_a_step_of_the_table(codec, error, num_values) -> None:
    values = torch.randn(num_values) * torch.logspace(-3, 3, num_values)
    state = codec.zeros("exp_avg", num_values, values.device)
    part = slice(0, num_values)
    assert codec.read(state, "exp_avg", part).abs().max() == 0
    codec.write(state, "exp_avg", part, values)
    largest = torch.stack([b.abs().amax() for b in values.split(codec.block_size)]).repeat_interleave(codec.block_size)
    found = codec.read(state, "exp_avg", part)
    assert ((found - values).abs() / largest[:num_values]).max() <= error
    codec.write(state, "exp_avg", part, found)
    assert torch.equal(codec.read(state, "exp_avg", part), found) or codec is FOUR_BITS


@pytest.mark.parametrize("codec", [FOUR_BITS, FP8])
def test_a_second_moment_never_becomes_zero_beside_a_large_one(codec) -> None:
    values = torch.full((256,), 1e-12)
    values[::64] = 1.0
    state = codec.zeros("exp_avg_sq", 256, values.device)
    codec.write(state, "exp_avg_sq", slice(0, 256), values)
    found = codec.read(state, "exp_avg_sq", slice(0, 256))
    assert (found >= values).all()
    assert torch.equal(found[::64], values[::64])


# -- Muon --------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_torch(nesterov, adjust) -> None:
    ours, reference = twins((40, 64), (64, 40))
    options = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
    before = ours[0].detach().clone()
    train(ours, Muon(ours, **options))
    train(reference, torch.optim.Muon(reference, **options))
    # torch iterates in bf16; worst seen: 0.6 % of the way gone
    assert worst(ours, reference) < 0.02 * (ours[0] - before).abs().max()


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (3, 20, 30)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape) -> None:
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), 5))
    # worst seen: 0.68 and 1.13
    assert 0.65 < values.min() < values.max() < 1.2


def test_muon_steps_stacks_matrix_by_matrix_and_kernels_as_one() -> None:
    stack, matrices = nn.Parameter(torch.randn(3, 20, 30)), []
    stack.grad = torch.randn_like(stack)
    for index in range(3):
        matrices.append(nn.Parameter(stack.detach()[index].clone()))
        matrices[-1].grad = stack.grad[index].clone()
    Muon([stack], lr=0.1).step()
    Muon(matrices, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in matrices]))
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    flat = nn.Parameter(kernel.detach().view(8, 36).clone())
    kernel.grad = torch.randn_like(kernel)
    flat.grad = kernel.grad.view(8, 36).clone()
    Muon([kernel], lr=0.1).step()
    Muon([flat], lr=0.1).step()
    assert torch.equal(kernel.view(8, 36), flat)


@pytest.mark.parametrize("cls", [Muon, GaLoreAdamW, ApolloAdamW])
def test_vectors_and_named_parameters_go_to_adamw(cls) -> None:
    ours, reference = twins((20, 30), (33,))
    train(ours, cls(ours, lr=1e-2, weight_decay=0.1, keep_32bit={id(ours[0])}))
    train(reference, torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.1))
    # worst seen: 0
    assert worst(ours, reference) < 1e-6


# -- GaLore ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 3, 2, 4)])
def test_galore_is_that_of_the_paper(shape) -> None:
    [weight], [p] = twins(shape)
    rank, gap = 6, 10
    options = {"rank": rank, "update_proj_gap": gap, "scale": 0.5}
    train([weight], GaLoreAdamW([weight], lr=1e-2, weight_decay=0.1, **options))
    w = p.detach().flatten(1).clone()
    w = w if w.shape[0] >= w.shape[1] else w.T.clone()
    generator = torch.Generator().manual_seed(2)
    low_shape = (w.shape[0], rank)
    first, second, basis = torch.zeros(low_shape), torch.zeros(low_shape), torch.zeros(w.shape[1], rank)
    for index in range(1, STEPS + 1):
        g = torch.randn(shape, generator=generator).flatten(1)
        g = g if g.shape[0] >= g.shape[1] else g.T
        if (index - 1) % gap == 0:
            new = torch.linalg.svd(g, full_matrices=False)[2][:rank].T.flip(1)
            # a singular vector is one up to its sign
            basis = new * (torch.linalg.eigh(g.T @ g)[1][:, -rank:] * new).sum(0).sign()
        low = g @ basis
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        adam = (first / (1 - 0.9**index)) / ((second / (1 - 0.999**index)).sqrt() + 1e-8)
        w = w * (1 - 1e-2 * 0.1) - 1e-2 * 0.5 * adam @ basis.T
    found = weight.detach().flatten(1)
    found = found if found.shape == w.shape else found.T
    # worst seen: 9.5e-7
    torch.testing.assert_close(found, w, atol=1e-5, rtol=0)


def test_galore_keeps_its_basis_between_two_projections() -> None:
    [weight], _ = twins((40, 24))
    optimizer = GaLoreAdamW([weight], rank=4, update_proj_gap=3)
    bases = []
    for seed in range(6):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        bases.append(optimizer.state[weight]["projection"].clone())
    same = [torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert same == [True, True, False, True, True]
    assert torch.allclose(bases[-1].T @ bases[-1], torch.eye(4), atol=1e-5)


# -- APOLLO ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_apollo_is_that_of_the_paper(shape, per_channel) -> None:
    [weight], [p] = twins(shape)
    rank, gap = 6, 10
    train([weight], ApolloAdamW([weight], lr=1e-2, weight_decay=0.1, rank=rank, update_proj_gap=gap, scale=0.7,
                                per_channel=per_channel))  # fmt: skip
    tall = shape[0] >= shape[1]
    w = p.detach() if tall else p.detach().T
    first, second = torch.zeros(w.shape[0], rank), torch.zeros(w.shape[0], rank)
    generator, last = torch.Generator().manual_seed(2), 0.0
    for index in range(1, STEPS + 1):
        g = torch.randn(shape, generator=generator)
        g = g if tall else g.T
        seed = (index - 1) // gap
        projection = torch.randn(w.shape[1], rank, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)
        low = g @ projection
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        adam = (first / (1 - 0.9**index)) / ((second / (1 - 0.999**index)).sqrt() + 1e-8)
        factor = (
            adam.norm(dim=1, keepdim=True) / low.norm(dim=1, keepdim=True) if per_channel else adam.norm() / low.norm()
        )
        scaled = 0.7 * factor * g
        if last and scaled.norm() > 1.01 * last:
            scaled = scaled / scaled.norm() * 1.01 * last
        last = scaled.norm()
        w = w * (1 - 1e-2 * 0.1) - 1e-2 * scaled
    # worst seen: 4.8e-7
    torch.testing.assert_close(weight.detach(), w if tall else w.T, atol=1e-5, rtol=0)


def test_apollos_projections_leave_the_global_generator_alone() -> None:
    [weight], _ = twins((40, 24))
    before = torch.get_rng_state()
    weight.grad = torch.ones_like(weight)
    ApolloAdamW([weight], rank=4).step()
    assert torch.equal(before, torch.get_rng_state())
