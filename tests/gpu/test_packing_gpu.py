"""Packs on a CUDA device: the kernels that exist only there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch

from lightning_memsave import PackedDataset, PackingCollator

pytestmark = pytest.mark.gpu

# bf16 rounds to 2**-8; the loss is a mean over 500 tokens.
TOLERANCE = 5e-3


def make_model(implementation: str, device: torch.device) -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(device, torch.bfloat16)


def packs() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    samples = [{"input_ids": torch.randint(1, 256, (n,), generator=generator)} for n in (100, 27, 1, 256, 90, 31)]
    return list(PackedDataset(samples, 256))


def loss_of(model: Any, collator: PackingCollator, device: torch.device) -> torch.Tensor:
    batch = collator(packs())
    return model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}).loss


@pytest.mark.parametrize("given", ["config", "nothing"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_documents_stay_apart(implementation: str, given: str, cuda: torch.device) -> None:
    if implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs flash-attn")
    model = make_model(implementation, cuda)
    collator = PackingCollator(config=model.config if given == "config" else None)
    collator.check(model)
    loss = loss_of(model, collator, cuda)
    loss.backward()
    expected = loss_of(make_model("eager", cuda), PackingCollator("additive"), cuda)
    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)


def test_flash_holds_no_mask(cuda: torch.device) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs flash-attn")
    batch = PackingCollator("flash")(packs())
    assert max(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)) == 8 * 505
