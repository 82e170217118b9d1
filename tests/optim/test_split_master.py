"""AdamW on split weights: five bytes a value, the losses of fp32, bounded temporaries, exact resume."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError
from lightning_memsave.optim import split_master
from lightning_memsave.optim.registry import OPTIMIZERS, family_of
from lightning_memsave.optim.split_master import SplitMasterAdamW
from lightning_memsave.optim.split_weights import attach_correction, join, split
from lightning_memsave.optim.state_bytes import held_state_bytes
from lightning_memsave.optim.swap import swap_optimizers

SHAPES = [(64, 96), (5, 1000), (4096,), (300,), (16, 3, 5, 5), (1,), ()]


def cast(values: Tensor, dtype: torch.dtype = torch.int8) -> nn.Parameter:
    """Return a bf16 parameter with its correction, as the cast of the precision plugin leaves it."""
    weight, correction = split(values, dtype)
    p = nn.Parameter(weight)
    attach_correction(p, correction)
    return p


def start(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.05 for shape in SHAPES]


def give_gradients(parameters: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-2).to(torch.bfloat16).to(p.dtype)


def masters(optimizer: SplitMasterAdamW, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [join(p.detach(), optimizer.state[p]["correction"]) for p in parameters]


def run(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give_gradients(parameters, step)
        optimizer.step()


# -- the rule ----------------------------------------------------------------------------------------------------------
def test_with_fp32_moments_and_int16_it_is_adamw_on_fp32_weights() -> None:
    wide = [nn.Parameter(value) for value in start()]
    reference = torch.optim.AdamW(wide, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    narrow = [cast(value, torch.int16) for value in start()]
    mine = SplitMasterAdamW(
        narrow, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, correction="int16", min_8bit_size=1 << 30
    )
    run(wide, reference, 20)
    run(narrow, mine, 20)
    for p, value in zip(wide, masters(mine, narrow)):
        # 20 steps of 1e-3; worst seen 3.8e-9
        assert (p.detach() - value).abs().max() < 1e-7


def test_with_8bit_moments_the_masters_follow_fp32_adamw() -> None:
    wide, narrow = [nn.Parameter(value) for value in start()], [cast(value) for value in start()]
    run(wide, torch.optim.AdamW(wide, lr=1e-3), 30)
    mine = SplitMasterAdamW(narrow, lr=1e-3)
    run(narrow, mine, 30)
    for p, value, before in zip(wide, masters(mine, narrow), start()):
        moved = (p.detach() - before).norm()
        # worst seen 0.017 of the way
        assert (p.detach() - value).norm() < 0.03 * moved


def test_fp32_parameters_are_stepped_by_plain_adamw() -> None:
    # kept norms and adapters
    wide, mixed = [nn.Parameter(value) for value in start()], [nn.Parameter(value) for value in start()]
    run(wide, torch.optim.AdamW(wide, lr=1e-3, weight_decay=0.1), 5)
    run(mixed, SplitMasterAdamW([*mixed, cast(torch.ones(3))], lr=1e-3, weight_decay=0.1), 5)
    for p, q in zip(wide, mixed):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-8)


def test_maximizing_is_minimizing_the_negative() -> None:
    up, down = [cast(value) for value in start()], [cast(value) for value in start()]
    ascent = SplitMasterAdamW([{"params": up, "maximize": True}], lr=1e-3)
    descent = SplitMasterAdamW(down, lr=1e-3)
    give_gradients(up, 0)
    give_gradients(down, 0)
    for p in down:
        p.grad = -p.grad
    ascent.step()
    descent.step()
    assert all(torch.equal(a, b) for a, b in zip(masters(ascent, up), masters(descent, down)))


def test_updates_far_below_a_bf16_spacing_reach_the_weights() -> None:
    # a spacing of the weights is 2e-3, a step is 2e-5
    p = cast(torch.full((8192,), 0.5))
    optimizer = SplitMasterAdamW([p], lr=2e-5, weight_decay=0.0)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # 200 steps of 2e-5; worst seen 5.2e-5 off
    assert masters(optimizer, [p])[0].mean().item() == pytest.approx(0.5 - 200 * 2e-5, abs=1e-4)
    assert p.detach().float().mean().item() == pytest.approx(0.5 - 200 * 2e-5, abs=1.1e-3)


def test_a_value_without_gradient_comes_to_rest() -> None:
    # Its moments share a scale with values that go on: rounding must let them reach zero, and never divide by it.
    p = cast(torch.zeros(4096))
    optimizer = SplitMasterAdamW([p], lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    trace = []
    for step in range(600):
        p.grad = torch.randn(4096, generator=generator).to(torch.bfloat16)
        if step > 10:
            p.grad[::2] = 0
        optimizer.step()
        trace.append(masters(optimizer, [p])[0][::2].clone())
    assert trace[-1].isfinite().all()
    assert (trace[-1] - trace[299]).abs().max() == 0, "it still moves 300 steps after its last gradient"
    assert (trace[-1] - trace[11]).abs().max() < 25e-3, "it was thrown away"


def test_zero_gradients_move_nothing_and_nan_is_seen() -> None:
    p = cast(torch.randn(5000))
    optimizer = SplitMasterAdamW([p], lr=1e-3, weight_decay=0.0)
    before = join(p.detach(), p._memsave_correction[0])  # type: ignore[attr-defined]
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(masters(optimizer, [p])[0], before)
    p.grad[7] = torch.nan
    optimizer.step()
    assert p.detach()[7].isnan()


# -- memory ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("correction", "limit"), [("int8", 5.1), ("int16", 6.1)])
def test_weight_master_and_moments_are_five_bytes_a_value(correction, limit) -> None:
    p = nn.Parameter(torch.zeros(1024, 1024, dtype=torch.bfloat16))
    optimizer = SplitMasterAdamW([p], correction=correction)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None  # released
    held = p.nbytes + held_state_bytes(optimizer)
    assert held == p.numel() * (2 + (1 if correction == "int8" else 2) + 2) + 2 * 4 * p.numel() // 256
    assert held / p.numel() <= limit


@pytest.mark.parametrize("keep", [False, True])
def test_no_copy_of_the_tensor_appears_in_a_step(keep) -> None:
    p = cast(torch.randn(40, 128 * 1024))
    optimizer = SplitMasterAdamW([p], keep_32bit={id(p)} if keep else ())
    p.grad = torch.ones_like(p)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    block = 4 * split_master._BLOCK_ON_CPU
    assert live.peak <= 8 * block, f"{live.peak / block:.1f} blocks"
    assert 8 * block < 4 * p.numel() / 4, "the tensor is too small to tell"


@pytest.mark.parametrize("size", [1, 255, 256, 257, 4095, 4097, 2**17, 2**17 + 1, 2**18 + 300])
def test_blocks_change_no_bit(size, monkeypatch) -> None:
    results = []
    for block in (2**17, 2**10, 2**30):
        monkeypatch.setattr(split_master, "_BLOCK_ON_CPU", block)
        p = cast(torch.linspace(-1, 1, size))
        optimizer = SplitMasterAdamW([p], min_8bit_size=0)
        run([p], optimizer, 2)
        results.append([masters(optimizer, [p])[0], *(optimizer.state[p][k] for k in ("first", "second"))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_strides_of_a_parameter_do_not_matter() -> None:
    value = torch.randn(8, 16, 8, 8)
    plain, last = cast(value), cast(value.to(memory_format=torch.channels_last))
    assert not last.is_contiguous()
    optimizers = [SplitMasterAdamW([p], lr=1e-2) for p in (plain, last)]
    for p, optimizer in zip((plain, last), optimizers):
        run([p], optimizer, 3)
    assert torch.equal(plain, last)


# -- what users do with an optimizer -----------------------------------------------------------------------------------
def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    result: dict[str, Any] = torch.load(buffer, weights_only=True)
    return result


@pytest.mark.parametrize("correction", ["int8", "int16"])
def test_resume_is_bit_exact(correction) -> None:
    def make() -> tuple[list[nn.Parameter], SplitMasterAdamW, CosineAnnealingLR]:
        parameters = [cast(value, torch.int16 if correction == "int16" else torch.int8) for value in start()]
        groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 5e-4, "weight_decay": 0.2}]
        optimizer = SplitMasterAdamW(groups, lr=1e-3, correction=correction, keep_32bit={id(parameters[1])})
        return parameters, optimizer, CosineAnnealingLR(optimizer, 10)

    def go(parts: Any, first: int) -> None:
        for step in range(first, first + 4):
            run(parts[0], parts[1], 1, first=step)
            parts[2].step()

    straight = make()
    go(straight, 0)
    weights = [p.detach().clone() for p in straight[0]]
    state, rates = saved(straight[1]), straight[2].state_dict()
    go(straight, 4)

    resumed = make()
    for p, weight in zip(resumed[0], weights):
        p.detach().copy_(weight)
    resumed[1].load_state_dict(state)
    resumed[2].load_state_dict(rates)
    assert not any(hasattr(p, "_memsave_correction") for p in resumed[0])
    go(resumed, 4)
    for p, q in zip(straight[0], resumed[0]):
        assert torch.equal(p, q)
        for key, value in straight[1].state[p].items():
            other = resumed[1].state[q][key]
            assert value == other if key == "step" else torch.equal(value, other) and value.dtype == other.dtype


def test_a_correction_that_waits_for_its_first_step_is_saved() -> None:
    stepped, waiting = cast(torch.randn(4096)), cast(torch.randn(4096))
    optimizer = SplitMasterAdamW([stepped, waiting])
    give_gradients([stepped], 0)
    optimizer.step()
    held = waiting._memsave_correction[0]  # type: ignore[attr-defined]
    state = saved(optimizer)
    assert torch.equal(state["state"][1]["correction"], held)
    assert state["state"][1]["step"] == 0


def test_one_parameter_at_a_time_is_the_same_step() -> None:
    # what GradientRelease does
    whole, single = [cast(value) for value in start()], [cast(value) for value in start()]
    together, apart = SplitMasterAdamW(whole, lr=1e-3), SplitMasterAdamW(single, lr=1e-3)
    for step in range(3):
        run(whole, together, 1, first=step)
        give_gradients(single, step)
        groups = apart.param_groups
        for p in reversed(single):
            apart.param_groups = [{**groups[0], "params": [p]}]
            apart.step()
        apart.param_groups = groups
    assert all(torch.equal(a, b) for a, b in zip(masters(together, whole), masters(apart, single)))


def test_bf16_weights_without_a_cast_start_somewhere_in_their_cells() -> None:
    values = torch.randn(5000).to(torch.bfloat16)
    made = []
    for _ in range(2):
        p = nn.Parameter(values.clone())
        state = torch.get_rng_state()
        optimizer = SplitMasterAdamW([p], lr=0.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        made.append(optimizer.state[p]["correction"])
        assert torch.equal(p, values)
    assert torch.equal(*made), "ranks would differ"
    assert made[0].float().std() > 60
    assert optimizer.num_drawn == 1


def test_a_closure_is_evaluated_once_with_gradients() -> None:
    p = cast(torch.ones(10))
    optimizer = SplitMasterAdamW([p])
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.float().square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


def test_a_deep_copy_goes_on_alike() -> None:
    parameters = [cast(value) for value in start()]
    optimizer = SplitMasterAdamW(parameters, keep_32bit={id(parameters[0])})
    run(parameters, optimizer, 2)
    copied_parameters, copied = copy.deepcopy((parameters, optimizer))
    run(parameters, optimizer, 1, first=2)
    run(copied_parameters, copied, 1, first=2)
    assert all(torch.equal(p, q) for p, q in zip(parameters, copied_parameters))


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_are_refused_with_what_to_write(dtype) -> None:
    with pytest.raises(ConfigurationError, match=r"trains bf16 weights.*BF16Precision\(\"split\"\)"):
        SplitMasterAdamW([nn.Parameter(torch.zeros(3, dtype=dtype))])


def test_arguments_are_checked() -> None:
    p = cast(torch.zeros(3))
    with pytest.raises(ConfigurationError, match="correction='int4'"):
        SplitMasterAdamW([p], correction="int4")
    optimizer = SplitMasterAdamW([p], correction="int16")
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigurationError, match=r"cast with torch.int8 corrections.*keeps torch.int16"):
        optimizer.step()


def test_a_checkpoint_of_another_correction_or_optimizer_is_refused() -> None:
    p = cast(torch.zeros(3))
    optimizer = SplitMasterAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    other = SplitMasterAdamW([cast(torch.zeros(3), torch.int16)], correction="int16")
    with pytest.raises(CheckpointMismatchError, match=r"holds torch.int8 corrections.*keeps torch.int16"):
        other.load_state_dict(optimizer.state_dict())
    plain = torch.optim.AdamW([p])
    plain.step()
    with pytest.raises(CheckpointMismatchError, match=r"'exp_avg'.*needs 'correction'"):
        optimizer.load_state_dict(plain.state_dict())


# -- behind its name ---------------------------------------------------------------------------------------------------
def test_its_name_swaps_it_in_and_keeps_groups_and_rule() -> None:
    net = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 128), nn.LayerNorm(128)).to(torch.bfloat16)
    net[2].float()
    old = torch.optim.AdamW(
        [{"params": net[0].parameters(), "lr": 1e-4}, {"params": [*net[1].parameters(), *net[2].parameters()]}],
        lr=3e-4,
        betas=(0.8, 0.9),
        eps=1e-6,
        maximize=True,
    )
    row = OPTIMIZERS["adamw_split_master"]
    new, [swapped] = swap_optimizers(old, net, row, options={"correction": "int16"}, keep_32bit="auto")
    assert type(new).__name__ == row.title
    assert family_of(new) == "adam"
    assert [group["lr"] for group in new.param_groups] == [1e-4, 3e-4]
    assert all((g["betas"], g["eps"], g["maximize"]) == ((0.8, 0.9), 1e-6, True) for g in new.param_groups)
    assert "8-bit state for 1 of 5 trainable tensors" in swapped.notes[-2]
    assert swapped.notes[-1].startswith("the fp32 values of 3 of 3 bf16 tensors are not known")
    give_gradients(list(net.parameters()), 0)
    new.step()
    assert held_state_bytes(new) == swapped.state_bytes_after
    assert "exp_avg" in new.state[net[0].weight]
    assert set(new.state[net[2].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(ConfigurationError, match="trains bf16 weights"):
        swap_optimizers(torch.optim.AdamW(nn.Linear(2, 2).parameters()), net, row, options={}, keep_32bit="auto")
