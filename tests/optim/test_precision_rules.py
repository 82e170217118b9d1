"""Precision settings that would fail late or silently are found in the optimizers and the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memsave.optim.precision_checks import loss_scaling_problems, precision_warnings, stuck_share
from lightning_memsave.optim.registry import OPTIMIZERS


def weights(dtype: torch.dtype, size: float = 0.02) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter((torch.randn(64, 64, generator=generator) * size).to(dtype))


def test_trainable_fp16_parameters_are_named_and_counted() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]).half()
    module[0].requires_grad_(False)
    [problem] = loss_scaling_problems(module.named_parameters(), [], clips=False)
    assert "6 trainable parameters are fp16: 1.weight, 1.bias, 2.weight, 2.bias, 3.weight and 1 more" in problem
    assert "p.data = p.data.float()" in problem


def test_the_line_the_message_gives_cures_it() -> None:
    module = nn.Linear(2, 2).half()
    [problem] = loss_scaling_problems(module.named_parameters(), [], clips=False)
    exec(problem[problem.index("for p in") : problem.index("), or use")], {"module": module})
    assert loss_scaling_problems(module.named_parameters(), [], clips=False) == []


@pytest.mark.parametrize(("clips", "count"), [(True, 1), (False, 0)])
def test_fused_adam_and_clipping_are_refused_together(clips, count) -> None:
    class Fused(torch.optim.Adam):
        _step_supports_amp_scaling = True  # what fused=True sets on a CUDA device

    fused = Fused([weights(torch.float32)])
    problems = loss_scaling_problems([], [fused], clips=clips)
    assert len(problems) == count
    assert all("fused=False" in problem for problem in problems)


def test_an_eps_that_underflows_in_fp16_is_said() -> None:
    [warning] = precision_warnings([torch.optim.Adam([weights(torch.float16, 1e-3)], lr=1e-2)])
    assert "eps=1e-08 underflows to 0" in warning
    assert "eps>=1e-6" in warning


def test_torchs_fp16_adam_really_gives_nan_there() -> None:
    p = weights(torch.float16)
    optimizer = torch.optim.Adam([p], foreach=False)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.isnan().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam([p], lr=1e-2, eps=1e-6),
        lambda p: OPTIMIZERS["adamw_8bit"].build([{"params": [p], "lr": 1e-2}], {}, ()),  # computes in fp32
        lambda p: torch.optim.SGD([p], lr=1e-2),
    ],
)
def test_what_works_in_fp16_is_not_warned_of(make) -> None:
    assert precision_warnings([make(weights(torch.float16, 1e-3))]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_the_stuck_share_is_what_adding_the_rate_leaves_unchanged(lr, dtype) -> None:
    p = weights(dtype)
    moved = (p.detach().float().abs() + lr).to(dtype)
    assert stuck_share([p], lr) == pytest.approx((moved == p.detach().abs()).float().mean().item(), abs=1e-6)


def test_steps_that_round_to_nothing_are_said_with_their_share() -> None:
    [warning] = precision_warnings([torch.optim.AdamW([weights(torch.bfloat16)], lr=1e-5)])
    share = stuck_share([weights(torch.bfloat16)], 1e-5)
    assert share > 0.8
    assert f"lr=1e-05 leaves {share:.0%} of the 16-bit weights unchanged" in warning
    assert precision_warnings([torch.optim.AdamW([weights(torch.bfloat16)], lr=1e-2)]) == []
    assert precision_warnings([torch.optim.AdamW([weights(torch.float32)], lr=1e-9)]) == []


def test_the_largest_rate_of_a_schedule_counts() -> None:
    optimizer = torch.optim.AdamW([weights(torch.bfloat16)], lr=1e-2)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-6)
    assert optimizer.param_groups[0]["lr"] < 1e-7
    assert precision_warnings([optimizer]) == []


def test_groups_with_the_same_warning_say_it_once() -> None:
    groups = [{"params": [weights(torch.bfloat16)]}, {"params": [weights(torch.bfloat16)]}]
    assert len(precision_warnings([torch.optim.AdamW(groups, lr=1e-5)])) == 1
