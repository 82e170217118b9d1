"""Merging in memory: names come back, and the outputs stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import LitLM, TinyLM
from torch import nn

from lightning_memsave import ConfigurationError, LoRA, NothingToTransformError, QLoRA, apply
from lightning_memsave.transforms.merging import MergeReport, merge_adapters

IDS = torch.arange(32).view(2, 16)
# Logits are below 20; worst seen 3.1e-5 over all cases (products in another order, fp32).
TOLERANCE = 1e-4


def adapted(callback: Any, **network: Any) -> nn.Module:
    """A network whose adapters change its output by far more than the tolerance."""
    torch.manual_seed(0)
    module = TinyLM(**network)
    apply(module, [callback])
    for name, parameter in module.named_parameters():
        if ".lora_B." in name or ".lora_embedding_" in name:
            nn.init.normal_(parameter, std=0.1)
    return module


CASES = {
    "lora": LoRA(rank=4),
    "rslora": LoRA(rank=4, variant="rslora"),
    "dora": LoRA(rank=4, variant="dora"),
    "dropout": LoRA(rank=4, dropout=0.5),
    "nf4": QLoRA(rank=4),
    "fp4": QLoRA(rank=4, kind="fp4"),
    "int8": QLoRA(rank=4, kind="int8"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_module_computes_the_same_under_the_old_names(case: str) -> None:
    module = adapted(CASES[case]).eval()
    expected = module(IDS)
    report = merge_adapters(module)
    quantized = case in ("nf4", "fp4", "int8")
    assert report == MergeReport(num_layers=12, num_dequantized=12 if quantized else 0)
    assert set(module.state_dict()) == set(TinyLM().state_dict())
    assert type(module.blocks[0].up) is nn.Linear
    assert all(p.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(module(IDS), expected, rtol=0, atol=TOLERANCE)
    assert (expected - TinyLM()(IDS)).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("adapted_layers", ["head", "embedding", ["head", "embedding"]])
def test_a_shared_weight_is_taken_apart_first(adapted_layers: Any) -> None:
    module = adapted(LoRA(rank=4, modules=adapted_layers), tied=True)
    expected = module(IDS)
    report = merge_adapters(module)
    assert len(report.untied) == 1
    assert module.head.weight is not module.embedding.weight
    torch.testing.assert_close(module(IDS), expected, rtol=0, atol=TOLERANCE)


def test_the_dtype_of_the_merged_weights_is_chosen() -> None:
    module = adapted(LoRA(rank=4, frozen_dtype="bf16"))
    wide = copy.deepcopy(module)
    expected = module(IDS)
    merge_adapters(wide, dtype=torch.float32)
    assert wide.blocks[0].up.weight.dtype == torch.float32
    torch.testing.assert_close(wide(IDS), expected, rtol=0, atol=TOLERANCE)
    merge_adapters(module)
    assert module.blocks[0].up.weight.dtype == torch.bfloat16


def test_other_adapters_can_be_added_after_merging() -> None:
    module = adapted(LoRA(rank=4))
    merge_adapters(module)
    apply(module, [LoRA(rank=2)])
    assert module.blocks[0].up.lora_A.default.weight.shape == (2, 64)


def test_a_lightning_module_keeps_its_prefix() -> None:
    module = LitLM()
    apply(module, [LoRA(rank=4)])
    merge_adapters(module)
    assert set(module.state_dict()) == set(LitLM().state_dict())


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(NothingToTransformError, match="TinyLM has no LoRA adapters"):
        merge_adapters(TinyLM())


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="is sharded or on the meta device"):
        merge_adapters(adapted(LoRA(rank=4)).to("meta"))
