"""Quantized weights and adapters on CUDA: precisions, moves between devices, and what the device holds meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LitLM, TinyLM, make_loader, make_trainer
from torch import nn

from lightning_memsave import ActivationCheckpointing, LoRA, LowMemoryOptimizer, QLoRA, WeightQuantization, apply
from lightning_memsave.transforms._bnb_layers import quantized_bytes
from lightning_memsave.transforms.quantization import KINDS, Quantization, quantize_weights

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_in_fp32_under_every_precision(kind: str, precision: str) -> None:
    module = LitLM(lr=1e-2)
    savers = [QLoRA(rank=4, kind=kind), ActivationCheckpointing(), LowMemoryOptimizer()]
    trainer = make_trainer(accelerator="gpu", callbacks=savers, max_epochs=3, precision=precision)
    trainer.fit(module, make_loader(), make_loader())
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert sum(module.losses[6:]) < sum(module.losses[:3])
    trainer.validate(module, make_loader(), verbose=False)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_every_variant_learns(variant: str) -> None:
    module = LitLM(lr=1e-2)
    savers: list[Any] = [WeightQuantization("nf4"), LoRA(rank=4, variant=variant, frozen_dtype="bf16")]
    make_trainer(accelerator="gpu", callbacks=savers, max_epochs=3, precision="bf16-mixed").fit(module, make_loader())
    assert sum(module.losses[6:]) < sum(module.losses[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_moves_between_devices(kind: str, cuda: torch.device) -> None:
    module = TinyLM()
    ids = torch.randint(0, 64, (2, 8))
    quantize_weights(module, Quantization(kind=kind))
    here = module(ids)
    there = module.to(cuda)(ids.to(cuda))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(module.cpu()(ids), here, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_never_holds_more_than_one_more_weight(kind: str, cuda: torch.device) -> None:
    width, depth = 2048, 8
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).to(cuda)
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_stats(cuda)["requested_bytes.all.current"]
    quantize_weights(module, Quantization(kind=kind, modules=("Linear",)))
    stats = torch.cuda.memory_stats(cuda)
    assert stats["requested_bytes.all.peak"] - before <= 4 * width * width
    saved = before - stats["requested_bytes.all.current"]
    held = sum(quantized_bytes(layer) for layer in module)
    assert abs(saved - (depth * 4 * width * width - held)) <= 4096  # tables that layers share


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_the_host_are_quantized_on_the_default_device_and_stay_there(kind: str, cuda: torch.device) -> None:
    module = TinyLM()
    with cuda:
        applied = apply(module, [QLoRA(rank=4, kind=kind)])
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    module(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert torch.cuda.memory_stats(cuda)["requested_bytes.all.current"] <= 4096
    applied.undo()
