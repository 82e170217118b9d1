"""Autocast's copies of the weights are kept where that saves memory, and never the wrong ones."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from lightning_memsave.transforms import _autocast_cache
from lightning_memsave.transforms._autocast_cache import AutocastCache, recomputes_activations

WIDTH = 256
BF16_COPY = WIDTH * WIDTH * 2


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH, bias=False, device="cpu", dtype=torch.float32)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


def forward(cache: AutocastCache | None, module: nn.Module, calls: int) -> tuple[torch.Tensor, int]:
    """Return the sum of the outputs and the bytes alive at the end of the forward."""
    x = torch.ones(2, WIDTH, requires_grad=True)  # so that the weight is saved for backward
    with LiveBytes() as live, cache.around(autocast()) if cache else autocast():
        total = sum(module(x + i).float().sum() for i in range(calls))
        return total, live.current


def test_a_reused_module_holds_one_copy_instead_of_one_a_call() -> None:
    said: list[str] = []
    _, without = forward(None, build(), 4)
    _, with_cache = forward(AutocastCache("on", build(), said.append), build(), 4)
    # 4 copies against 1; the rest is a few vectors (worst seen: 9 KiB)
    assert without >= 4 * BF16_COPY
    assert with_cache <= 1.3 * BF16_COPY
    assert said == ["autocast's copies of the weights are kept until the forward ends"]


@pytest.mark.parametrize("calls", [1, 3])
def test_gradients_differ_only_by_their_sum_in_bf16(calls) -> None:
    gradients = []
    for policy in ("on", "off"):
        module = build()
        total, _ = forward(AutocastCache(policy, module, print), module, calls)
        total.backward()
        gradients.append(module.weight.grad)
    if calls == 1:
        assert torch.equal(*gradients)
    # three addends of 8 bits; worst seen: 0 on these values
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize(("calls", "expected"), [(1, False), (2, True)])
def test_auto_looks_at_the_first_training_forward(calls, expected) -> None:
    module = build()
    said: list[str] = []
    cache = AutocastCache("auto", module, said.append)
    with torch.no_grad():
        forward(cache, module, 3)  # a validation pass decides nothing
    assert cache.enabled is None
    forward(cache, module, calls)
    assert cache.enabled is expected
    assert len(said) == 1
    assert not module._forward_pre_hooks
    forward(cache, module, 5)
    assert cache.enabled is expected


def test_auto_is_off_where_activations_are_recomputed() -> None:
    module = nn.Sequential(build())
    module[0].gradient_checkpointing = True
    assert recomputes_activations(module)
    assert AutocastCache("auto", module, print).enabled is False
    assert not module[0]._forward_pre_hooks


def test_close_takes_the_hooks_away() -> None:
    module = build()
    cache = AutocastCache("auto", module, print)
    assert module._forward_pre_hooks
    cache.close()
    cache.close()
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("policy", ["on", "off"])
def test_a_forward_without_gradients_first_leaves_them_for_the_second(policy) -> None:
    module = build()
    cache = AutocastCache(policy, module, print)
    with cache.around(autocast()):
        with torch.no_grad():
            module(torch.ones(2, WIDTH))
        module(torch.ones(2, WIDTH)).sum().backward()
    assert module.weight.grad is not None


def test_the_guard_for_older_torch_forgets_casts_when_gradients_are_switched(monkeypatch) -> None:
    monkeypatch.setattr(_autocast_cache, "_caches_wrong_casts", lambda: True)
    cleared: list[bool] = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(torch.is_grad_enabled()))
    module = build()
    with AutocastCache("on", module, print).around(autocast()):
        with torch.no_grad():
            module(torch.ones(2, WIDTH))
        module(torch.ones(2, WIDTH))
        assert cleared == [True, False]  # gradients off, then on again
