"""Gradients are dropped for the optimizers that really stepped."""

from __future__ import annotations

import torch
from torch import nn

from lightning_memsave.optim.zero_grad import StepWatch, drop_gradients, gradient_bytes


def test_bytes_are_counted_before_and_after() -> None:
    shared = nn.Parameter(torch.zeros(10))
    frozen = nn.Parameter(torch.zeros(7), requires_grad=False)
    first = torch.optim.SGD([shared, frozen], lr=0.1)
    second = torch.optim.SGD([shared], lr=0.1)
    assert gradient_bytes([first, second], expected=True) == 40
    shared.grad = torch.ones(10)
    assert gradient_bytes([first, second]) == 40
    drop_gradients([second])
    assert gradient_bytes([first, second]) == 0


def test_only_optimizers_that_stepped_are_reported_and_once() -> None:
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    watch = StepWatch([first, second])
    first.step()
    first.step()
    assert watch.take() == [first]
    assert watch.take() == []
    watch.close()
    watch.close()
    second.step()
    assert watch.take() == []
    assert not second._optimizer_step_post_hooks
