"""Recomputed blocks on a CUDA device: device random numbers, exact bytes, loss scaling, attention kernels."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from recompute_helpers import Residual, Stack
from torch import Tensor, nn

from lightning_memsave import ActivationCheckpointing, MemoryAudit
from lightning_memsave.transforms.checkpoint_blocks import checkpoint_blocks, recompute_counts

pytestmark = pytest.mark.gpu

# Atomic additions in CUDA's embedding backward come in any order.
TOLERANCE = 1e-3


class Named(nn.Module):
    """Takes its tensors by name, where torch's checkpoint alone would not look for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, *, hidden: Tensor) -> Tensor:
        return hidden + F.dropout(torch.tanh(self.linear(hidden)), 0.5)


class Caller(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden=x)
        return x


class HiddenCaller(Stack):
    def forward(self, x: Tensor) -> Tensor:
        batch = SimpleNamespace(x=x)
        for layer in self.layers:
            layer(batch)
        return batch.x


class Hidden(Named):
    """Takes an object that hides its tensor, and writes on it."""

    def forward(self, batch: Any) -> None:  # type: ignore[override]
        batch.x = super().forward(hidden=batch.x)


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize(("caller", "block"), [(Caller, Named), (HiddenCaller, Hidden)])
def test_dropout_masks_of_the_device_are_replayed(cuda, caller, block, policy):
    torch.manual_seed(0)
    plain = caller(block).to(cuda)
    model = copy.deepcopy(plain)
    checkpoint_blocks(model, policy=policy)
    x, grads = torch.randn(8, 64, device=cuda), []
    for each in (plain, model):
        torch.manual_seed(1)
        each(x).square().sum().backward()
        grads.append([p.grad for p in each.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert all(count.recomputed == 1 for count in recompute_counts(model).values())


def held_bytes(device: torch.device, model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward leaves on the device, as requested from the allocator."""
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    loss = model(x).sum()
    after = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    loss.backward()
    return after - before - loss.nbytes


def test_full_keeps_only_what_the_blocks_are_given(cuda):
    x = torch.randn(16, 128, 64, device=cuda)  # batch * tokens * hidden * itemsize
    model = Stack(lambda: Residual(64), depth=4).to(cuda)
    unit = 16 * 128 * 64 * 4
    held_bytes(cuda, model, x)  # cuBLAS takes its workspace at the first call
    assert held_bytes(cuda, model, x) == 4 * (2 + 2 + 1) * unit
    checkpoint_blocks(model)
    held_bytes(cuda, model, x)
    # the inputs of blocks 2 to 4, which the blocks before returned, and the last output, which `sum` does not keep
    assert held_bytes(cuda, model, x) == 3 * unit


@pytest.mark.parametrize("policy", ["full", "selective", "every_n"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_training_is_equal_in_every_precision(cuda, precision, policy):
    losses = []
    for savers in ([], [ActivationCheckpointing(policy=policy)]):
        torch.manual_seed(0)
        module = LitLM(dropout=0.1)
        torch.manual_seed(1)
        make_trainer(accelerator="gpu", precision=precision, callbacks=savers).fit(module, make_loader())
        losses.append(module.losses)
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_compiled_blocks_train_alike(cuda, policy):
    torch.manual_seed(0)
    plain = Stack(lambda: Residual(64)).to(cuda)
    model = copy.deepcopy(plain)
    checkpoint_blocks(model, policy=policy)
    for layer in model.layers:
        layer.compile()
    x = torch.randn(8, 64, device=cuda)
    for each in (plain, model):
        each(x).sum().backward()
    torch._dynamo.reset()
    for expected, got in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-4)


def attention(precision: str) -> list[dict[str, Any]]:
    trainer = make_trainer(accelerator="gpu", precision=precision, callbacks=[MemoryAudit()])
    trainer.fit(LitLM(), make_loader())
    with open(f"{trainer.default_root_dir}/memsave/audit.json") as file:
        return [finding for finding in json.load(file)["findings"] if finding["check"] == "attention"]


def test_the_audit_says_which_attention_kernels_can_run(cuda):
    (half,) = attention("bf16-mixed")
    assert half["status"] == "ok"
    assert "in bfloat16, causal: " in half["text"]
    assert "flash" in half["text"]
    (single,) = attention("32-true")
    assert "in float32, causal: " in single["text"]
    assert "flash" not in single["text"]
