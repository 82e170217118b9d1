"""Adapters: peft's numbers bitwise, fewer saved bytes, and nothing else touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import TinyLM
from torch import Tensor, nn

from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms._adapter_layers import kept_in_dtype
from lightning_memsave.transforms.adapters import VARIANTS, Adapters, add_adapters, parameter_bytes
from lightning_memsave.transforms.quantization import Quantization, quantize_weights

IDS = torch.arange(24).view(2, 12) % 64
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "up", "down"]
RANK = 4


def settings(**options: Any) -> Adapters:
    return Adapters(**{"rank": RANK, "alpha": 2 * RANK, **options})


def build(**options: Any) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(**options)


def peft_twin(variant: str = "lora", kind: str | None = None, **options: Any) -> nn.Module:
    """The same model with the same adapters, made by peft alone."""
    import peft

    module = build()
    if kind is not None:
        quantize_weights(module, Quantization(kind=kind))
        module.is_loaded_in_4bit = module.is_loaded_in_8bit = True
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=LAYERS,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        **options,
    )
    torch.manual_seed(1)
    return peft.inject_adapter_in_model(config, module)


def ours(variant: str = "lora", kind: str | None = None, **options: Any) -> nn.Module:
    module = build()
    if kind is not None:
        quantize_weights(module, Quantization(kind=kind))
    torch.manual_seed(1)
    add_adapters(module, settings(variant=variant, **options))
    return module


def fill(module: nn.Module) -> None:
    """Give B values, so that gradients reach A."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def gradients(module: nn.Module, autocast: bool) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(IDS).float().pow(2).mean()
    loss.backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_bitwise_those_of_peft(variant: str, autocast: bool) -> None:
    module, twin = ours(variant), peft_twin(variant)
    fill(module)
    fill(twin)
    found, expected = gradients(module, autocast), gradients(twin, autocast)
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 12 * (3 if variant == "dora" else 2)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_quantized_weights_they_are_those_of_peft_too(kind: str, autocast: bool) -> None:
    module, twin = ours(kind=kind), peft_twin(kind=kind)
    assert type(module.blocks[0].up).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    fill(module)
    fill(twin)
    found, expected = gradients(module, autocast), gradients(twin, autocast)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(found) == len(expected) == 25


# -- saved bytes -------------------------------------------------------------------------------------------------------
@contextmanager
def saved_storages() -> Iterator[dict[int, Tensor]]:
    """What autograd keeps for backward, every storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def saved_bytes(module: nn.Module) -> int:
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with saved_storages() as kept, torch.autocast("cpu", torch.bfloat16):
        out = module(IDS)
        found = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    del out
    return found


def test_no_cast_copy_of_a_frozen_weight_is_saved() -> None:
    # F.linear saves the bf16 copy of a frozen fp32 weight, unless its input needs no gradient (the first q, k and v)
    module, twin = ours(), peft_twin()
    frozen = [n for n, p in module.named_parameters() if n.endswith("base_layer.weight") or n == "head.weight"]
    copies = sum(2 * module.get_parameter(n).numel() for n in frozen) - 3 * 2 * 64 * 64
    assert copies == 180_224
    assert saved_bytes(twin) - saved_bytes(module) >= copies


def test_no_fp32_copy_of_an_adapter_input_is_saved() -> None:
    import peft

    def one_layer(lean: bool) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 2))
        if lean:
            add_adapters(module, settings(modules=("0",)))
        else:
            module = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=["0"]), module)
            module[0].lora_A.float()
            module[0].lora_B.float()
        return module[0]

    x = torch.randn(8, 64, dtype=torch.bfloat16)
    found = {}
    for lean in (True, False):
        layer = one_layer(lean)
        with saved_storages() as kept:
            out = layer(x)
        found[lean] = [t.dtype for t in kept.values() if t.shape == x.shape]
        del out
    assert found[False] == [torch.float32], "peft alone keeps an fp32 copy of the input"
    assert found[True] == [torch.bfloat16]


# -- what is frozen, and what is not -----------------------------------------------------------------------------------
def test_only_adapters_train_and_other_names_stay() -> None:
    module = build()
    before = set(module.state_dict())
    applied = add_adapters(module, settings())
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert len(trained) == 24
    assert all("lora_" in name for name in trained)
    assert {n.replace("base_layer.", "") for n in module.state_dict() if "lora_" not in n} == before
    assert applied.num_modules == 12
    assert applied.bytes_after - applied.bytes_before == sum(
        4 * RANK * (i + o) for i, o in [(64, 64)] * 8 + [(64, 256)] * 2 + [(256, 64)] * 2
    )
    assert module.blocks[0].up.in_features == 64
    assert module.blocks[0].up.weight is module.blocks[0].up.base_layer.weight


def test_train_keeps_a_head_trainable_as_it_is() -> None:
    module = build()
    applied = add_adapters(module, settings(train=("head",)))
    assert module.head.weight.requires_grad
    assert not module.embedding.weight.requires_grad
    assert applied.summary.endswith("values train, with head")


def test_a_head_that_may_be_new_is_named() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    applied = add_adapters(module, settings())
    assert "the head 2 is frozen (if it is new, write train='2')" in applied.summary
    assert "the head" not in add_adapters(build(), settings()).summary, "a vocabulary comes with the model"


def test_train_refuses_what_cannot_train() -> None:
    module = build().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="every parameter below head is frozen"):
        add_adapters(module, settings(train=("head",)))
    module = build()
    quantize_weights(module, Quantization())
    with pytest.raises(ConfigurationError, match=r"train= selects blocks\.0\.up\.weight, which is quantized"):
        add_adapters(module, settings(train=("*.0.up",)))
    with pytest.raises(ConfigurationError, match="head is selected by modules= and by train="):
        add_adapters(build(), settings(modules=("head",), train=("head",)))


def test_embeddings_and_convolutions_are_adapted_when_named() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 64))
    add_adapters(module, settings(modules=("Conv2d",)))
    module(torch.randn(2, 3, 8, 8)).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is not None] == [
        f"{i}.lora_{x}.default.weight" for i in (0, 2) for x in "AB"
    ]
    module = build()
    add_adapters(module, settings(modules=("embedding",)))
    module(IDS).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is not None] == [
        "embedding.lora_embedding_A.default",
        "embedding.lora_embedding_B.default",
    ]


def test_a_container_means_the_linear_layers_in_it() -> None:
    module = build()
    assert add_adapters(module, settings(modules=("blocks.1",))).num_modules == 6
    assert type(module.blocks[0].up) is nn.Linear


def test_validation_of_torch_encoder_layers_uses_the_adapters() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2), nn.Linear(64, 3)
    )
    applied = add_adapters(module, settings())
    fill(module)
    module.eval()
    x, mask = torch.randn(2, 3, 64), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        fast = module[0](x, src_key_padding_mask=mask)
    slow = module[0](x, src_key_padding_mask=mask).detach()
    torch.testing.assert_close(fast[~mask], slow[~mask], rtol=1e-5, atol=1e-5)
    applied.undo()
    assert module[0].layers[0].activation_relu_or_gelu == 1
    assert module[0].use_nested_tensor


# -- dtypes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_matrices_can_be_stored_in_bf16(tied: bool) -> None:
    module = build(tied=tied)
    expected = copy.deepcopy(module)
    matrices = {p for n, p in expected.named_parameters() if "norm" not in n}
    applied = add_adapters(module, settings(frozen_dtype=torch.bfloat16))
    adapters = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert applied.bytes_before - (applied.bytes_after - adapters) == sum(p.nbytes // 2 for p in matrices)
    assert module.blocks[0].norm1.weight.dtype == torch.float32
    assert (module.head.weight is module.embedding.weight) == tied
    for parameter in matrices:
        parameter.data = parameter.data.bfloat16().float()
    out = module(IDS)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected(IDS)), "the rounding of the weights is the only difference"
    out.sum().backward()
    applied.undo()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module(IDS), expected(IDS))


def test_an_embedding_somebody_else_reads_keeps_its_dtype() -> None:
    class Reads(nn.Module):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.table = embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table.t()

    embedding = nn.Embedding(64, 32)
    module = nn.Sequential(embedding, nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32)), Reads(embedding))
    add_adapters(module, settings(modules=("1",), frozen_dtype=torch.bfloat16))
    assert embedding.weight.dtype == torch.float32
    assert module[2][0].weight.dtype == torch.bfloat16
    module(IDS).sum().backward()


def test_a_layer_that_is_unfrozen_later_gets_gradients() -> None:
    module = build()
    add_adapters(module, settings(frozen_dtype=torch.bfloat16))
    module.head.requires_grad_(True)
    module(IDS).sum().backward()
    assert module.head.weight.grad is not None


def test_adapters_are_fp32_whatever_the_default_and_the_base_are() -> None:
    module = build().bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        add_adapters(module, settings())
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    out = module(IDS)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    other = build().bfloat16()
    add_adapters(other, settings(adapter_dtype=torch.bfloat16))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}


def test_a_cast_of_the_module_leaves_adapters_bit_for_bit() -> None:
    module = build()
    add_adapters(module, settings(train=("head",), frozen_dtype=torch.bfloat16))
    before = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    with kept_in_dtype(module):
        module.to(torch.bfloat16)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters() if n in before)
    assert module.blocks[0].norm1.weight.dtype == torch.bfloat16
    assert module(IDS).dtype == torch.bfloat16, "embeddings follow the cast"
    assert not dict(module.named_buffers())


# -- the way back, and what is refused ---------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_undo_takes_the_adapters_out(variant: str) -> None:
    module = build()
    expected, keys = module(IDS), list(module.state_dict())
    attributes = [set(m.__dict__) for m in module.modules()]
    module.blocks[0].norm1.requires_grad_(False)
    applied = add_adapters(module, settings(variant=variant))
    applied.undo()
    assert torch.equal(module(IDS), expected)
    assert list(module.state_dict()) == keys
    assert [set(m.__dict__) for m in module.modules()] == attributes
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == [
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
    ]


def test_a_copy_trains_its_own_adapters() -> None:
    module = build()
    add_adapters(module, settings())
    fill(module)
    other = copy.deepcopy(module)
    expected = module(IDS)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(module(IDS), expected)
    other(IDS).sum().backward()
    assert all(p.grad is None for p in module.parameters())


def test_adapters_that_are_there_already_are_refused() -> None:
    module = peft_twin()
    with pytest.raises(ConfigurationError, match=r"blocks\.0\.q_proj and 11 more layers carry peft adapters already"):
        add_adapters(module, settings())
    with pytest.raises(ConfigurationError, match="weights are quantized before adapters are added"):
        quantize_weights(module, Quantization())


def test_nothing_to_adapt_is_refused() -> None:
    with pytest.raises(NothingToTransformError, match=r"among 1 in Sequential \(left out: 1 head\)"):
        add_adapters(nn.Sequential(nn.ReLU(), Head()), settings())
    with pytest.raises(NothingToTransformError, match="matched none"):
        add_adapters(build(), settings(modules=("*.qproj",)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(64, 3)


def test_a_root_with_attributes_peft_would_read_is_adapted_all_the_same() -> None:
    module = build()
    module.config, module.hf_device_map, module._device_mesh = object(), None, "mesh"
    add_adapters(module, settings())
    assert "peft_config" not in module.__dict__
    assert parameter_bytes(module) > 0
