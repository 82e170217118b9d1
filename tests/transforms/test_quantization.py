"""Quantized weights: exact bytes, exact products, one weight at a time, and what is left alone."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyLM
from torch import Tensor, nn

from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms import _bnb_layers
from lightning_memsave.transforms._bnb_layers import dequantized_weight
from lightning_memsave.transforms.quantization import KINDS, Quantization, quantize_weights

SHAPES = ((64, 64), (96, 72), (200, 333))  # whole blocks of 64 values; 108 blocks; a last block of 40 values


class Net(nn.Module):
    """Linear layers of several shapes before a head."""

    def __init__(self, *shapes: tuple[int, int], bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in shapes)
        self.head = nn.Linear(64, 5000)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs)]


def formula(shape: tuple[int, int], kind: str, double_quant: bool) -> int:
    """Bytes of one weight, as the docstring of ``WeightQuantization`` says."""
    values = shape[0] * shape[1]
    if kind == "int8":
        return values + 4 * shape[1]
    if double_quant:
        return math.ceil(values / 2) + math.ceil(values / 64) + 4 * math.ceil(values / 16384) + 68
    return math.ceil(values / 2) + 4 * math.ceil(values / 64) + 64


def held_bytes(module: nn.Module) -> int:
    """Bytes of every tensor reachable from linear layers' weights, shared storages and the shared table once."""
    storages: dict[int, int] = {}
    for layer in module.layers:
        weight = layer.weight
        found = [weight.data, getattr(weight, "SCB", None), getattr(weight, "CB", None)]
        state = getattr(weight, "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code, state.offset]
            found += [state.state2.absmax] if state.nested else []
        storages |= {t.untyped_storage().data_ptr(): t.nbytes for t in found if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_holds_the_bytes_of_the_formula(kind: str, double_quant: bool) -> None:
    module = Net(*SHAPES)
    applied = quantize_weights(module, Quantization(kind=kind, double_quant=double_quant))
    assert applied.num_modules == len(SHAPES)
    assert applied.bytes_before == sum(4 * i * o for i, o in SHAPES)
    assert applied.bytes_after == sum(formula(shape, kind, double_quant) for shape in SHAPES)
    assert applied.bytes_after == held_bytes(module)


# largest |error| / block (or row) maximum: half the widest gap of the codes; int8 rounds to fp16 first
@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.153), ("fp4", 0.167), ("int8", 1 / 225)])
def test_values_move_by_no_more_than_the_bound(kind: str, bound: float) -> None:
    module = Net((256, 128))
    before = module.layers[0].weight.detach().clone()
    quantize_weights(module, Quantization(kind=kind, double_quant=False))
    error = (dequantized_weight(module.layers[0], torch.float32) - before).abs()
    blocks = before if kind == "int8" else before.view(-1, 64)
    assert (error.view(blocks.shape) <= bound * blocks.abs().amax(1, keepdim=True)).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_dequantized_weight(kind: str, dtype: torch.dtype) -> None:
    module = Net(*SHAPES)
    quantize_weights(module, Quantization(kind=kind))
    for layer in module.layers:
        x = torch.randn(2, 3, layer.in_features, dtype=dtype, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        out, expected = layer(x), F.linear(y, dequantized_weight(layer, dtype), layer.bias.to(dtype))
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        grad = torch.randn_like(out)
        out.backward(grad)
        expected.backward(grad)
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_decides_the_dtype_of_the_output(kind: str) -> None:
    module = Net((64, 64))
    quantize_weights(module, Quantization(kind=kind))
    x = torch.randn(2, 64)
    module.layers[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module.layers[0](x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, module.layers[0](x.bfloat16()))
    assert module.layers[0](x).dtype == torch.float32, "the dtype of an earlier call must not stick"


def test_a_compute_dtype_is_used_whatever_the_input_is() -> None:
    module = Net((64, 64))
    quantize_weights(module, Quantization(compute_dtype=torch.bfloat16))
    x = torch.randn(2, 64)
    out = module.layers[0](x)
    assert out.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float())


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_but_the_one_at_work_is_held_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Net(*[(64, 64)] * 5)
    olds = [weakref.ref(layer.weight) for layer in module.layers]
    pack, alive = _bnb_layers._pack, []

    def watched(*args: Any) -> Any:
        alive.append(sum(old() is not None for old in olds))
        return pack(*args)

    monkeypatch.setattr(_bnb_layers, "_pack", watched)
    applied = quantize_weights(module, Quantization(kind=kind))
    assert alive == [5, 4, 3, 2, 1], "an old weight must be released before the next one is quantized"
    assert not any(old() for old in olds)
    assert applied.undo is not None


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_between_steps_changes_nothing(kind: str) -> None:
    module = Net((64, 64))
    quantize_weights(module, Quantization(kind=kind))
    x = torch.randn(2, 64)
    before, codes = module.layers[0](x), module.layers[0].weight.data.clone()
    module.eval()
    with torch.no_grad():
        assert torch.equal(module.layers[0](x), before)
    module.train()
    y = x.clone().requires_grad_()
    module.layers[0](y).sum().backward()
    assert y.grad is not None
    assert torch.equal(module.layers[0].weight.data, codes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_independent_and_casting_the_module_leaves_the_codes(kind: str) -> None:
    module = Net((64, 64))
    quantize_weights(module, Quantization(kind=kind))
    x = torch.randn(2, 64)
    expected = module.layers[0](x)
    other = copy.deepcopy(module)
    other.layers[0].weight.data.zero_()
    assert torch.equal(module.layers[0](x), expected)
    assert not torch.equal(other.layers[0](x), expected)
    module.to(torch.bfloat16)
    assert not module.layers[0].weight.is_floating_point()
    torch.testing.assert_close(module.layers[0](x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_undo_puts_class_names_hooks_and_flags_back(kind: str) -> None:
    module = Net((64, 64))
    layer, calls = module.layers[0], []
    layer.register_forward_hook(lambda *args: calls.append(1))
    keys, attributes = list(module.state_dict()), set(layer.__dict__)
    applied = quantize_weights(module, Quantization(kind=kind))
    expected = layer(torch.ones(1, 64))
    assert isinstance(layer, nn.Linear)
    assert module.layers[0] is layer
    applied.undo()
    assert type(layer) is nn.Linear
    assert list(module.state_dict()) == keys
    assert set(layer.__dict__) == attributes
    assert torch.equal(layer(torch.ones(1, 64)), expected), "what rounding took away is lost, the rest is not"
    assert calls == [1, 1]
    assert all(p.requires_grad for p in module.parameters())
    layer.load_state_dict(nn.Linear(64, 64).state_dict())


# -- what is left alone ------------------------------------------------------------------------------------------------
def quantized(module: nn.Module) -> list[str]:
    return [n for n, m in module.named_modules() if type(m).__module__.startswith("bitsandbytes")]


def test_heads_are_left_by_name_by_place_and_by_size() -> None:
    module = TinyLM()
    quantize_weights(module, Quantization())
    assert len(quantized(module)) == 12
    assert type(module.head) is nn.Linear
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(32, 32), nn.Linear(64, 64))
    applied = quantize_weights(plain, Quantization())
    assert quantized(plain) == ["0"]
    assert applied.summary.endswith("left as they are: 1 below 4,096 values, 1 head")


def test_tied_weights_stay_tied() -> None:
    module = TinyLM(tied=True)
    quantize_weights(module, Quantization())
    assert module.head.weight is module.embedding.weight
    assert type(module.head) is nn.Linear


def test_layers_whose_weight_others_read_are_left() -> None:
    module = nn.Sequential(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
        torch.nn.utils.spectral_norm(nn.Linear(64, 64)),
        nn.Linear(64, 64),
    )
    quantize_weights(module, Quantization())
    assert quantized(module) == ["0.linear1", "0.linear2"]
    x = torch.randn(2, 3, 64)
    module.eval()
    with torch.no_grad():
        fast = module(x)
    # the fused path of the whole layer would read packed codes; that of attention inside it rounds differently
    torch.testing.assert_close(fast, module(x).detach(), rtol=1e-4, atol=1e-4)


def test_skip_takes_names_and_classes_with_everything_below() -> None:
    module = TinyLM()
    quantize_weights(module, Quantization(skip=("blocks.0", "*.up")))
    assert quantized(module) == [f"blocks.1.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "down")]


def test_next_to_frozen_layers_those_that_train_are_left() -> None:
    module = TinyLM()
    module.blocks[0].requires_grad_(False)
    quantize_weights(module, Quantization())
    assert all(name.startswith("blocks.0") for name in quantized(module))
    assert module.blocks[1].up.weight.requires_grad


def test_what_is_quantized_is_frozen_with_its_bias() -> None:
    module = TinyLM()
    quantize_weights(module, Quantization())
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    assert len(frozen) == 12 + 4
    assert all("norm" not in n and "head" not in n for n in frozen)


def test_a_named_head_is_quantized_unless_it_is_tied() -> None:
    module = TinyLM()
    quantize_weights(module, Quantization(modules=("head",)))
    assert quantized(module) == ["head"]
    tied = TinyLM(tied=True)
    with pytest.raises(ConfigurationError, match="head shares its weight with another module"):
        quantize_weights(tied, Quantization(modules=("head",)))


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_nothing_left_says_what_was_left_out() -> None:
    with pytest.raises(NothingToTransformError, match=r"3 in Sequential \(left out: 2 below 4,096 values, 1 head\)"):
        quantize_weights(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), Quantization())


def test_a_weight_that_trains_is_not_quantized() -> None:
    module = TinyLM()
    module.blocks[0].requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"blocks.1.up trains \(requires_grad=True next to frozen weights\)"):
        quantize_weights(module, Quantization(modules=("blocks.1.up",)))
    with pytest.raises(ConfigurationError, match=r"blocks.1.up is in train, and a quantized weight cannot train"):
        quantize_weights(TinyLM(), Quantization(modules=("blocks.1.up",), train=("*.up",)))
    assert not quantized(module)


def test_a_module_without_linear_layers_is_refused_by_its_class() -> None:
    with pytest.raises(ConfigurationError, match="modules='LayerNorm' matched LayerNorm and no layer this can work on"):
        quantize_weights(TinyLM(), Quantization(modules=("LayerNorm",)))


def test_weights_without_values_or_spread_over_devices_are_refused() -> None:
    with torch.device("meta"):
        module = TinyLM()
    with pytest.raises(ConfigurationError, match=r"embedding\.weight has no values yet"):
        quantize_weights(module, Quantization())
    module = TinyLM()
    module.blocks.hf_device_map = {"0": 0, "1": 1}
    with pytest.raises(ConfigurationError, match=r"device_map spread blocks over 0, 1"):
        quantize_weights(module, Quantization())


def test_a_failure_midway_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Net((64, 64), (64, 64))
    pack, calls = _bnb_layers._pack, []

    def fails_second(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return pack(*args)

    monkeypatch.setattr(_bnb_layers, "_pack", fails_second)
    with pytest.raises(MemoryError):
        quantize_weights(module, Quantization())
    assert not quantized(module)
    assert all(p.requires_grad for p in module.parameters())


# -- models quantized by others ----------------------------------------------------------------------------------------
def loaded(kind: str = "nf4") -> TinyLM:
    """A model as a loader leaves it: bitsandbytes layers with their own forward."""
    import bitsandbytes as bnb

    module = TinyLM()
    for block in module.blocks:
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(block.q_proj.weight.data, requires_grad=False, quant_type=kind)
        block.q_proj = layer.to("cpu")
    return module


def test_layers_that_are_quantized_already_are_kept() -> None:
    module = loaded()
    codes = module.blocks[0].q_proj.weight.data.clone()
    applied = quantize_weights(module, Quantization())
    assert applied.summary == "2 linear weights were nf4 already"
    assert applied.bytes_before == applied.bytes_after
    assert torch.equal(module.blocks[0].q_proj.weight.data, codes)
    assert type(module.blocks[0].up) is nn.Linear, "what the loader left out stays as it is"


def test_another_network_beside_a_loaded_one_is_quantized() -> None:
    module = nn.ModuleDict({"loaded": loaded(), "plain": TinyLM()})
    root = nn.Module()
    root.loaded, root.plain = module["loaded"], module["plain"]
    applied = quantize_weights(root, Quantization())
    assert applied.num_modules == 2 + 12
    assert sum(name.startswith("plain") for name in quantized(root)) == 12


def test_another_kind_of_quantization_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"blocks.0.q_proj .* it is nf4 already, and int8 was asked for"):
        quantize_weights(loaded(), Quantization(kind="int8"))
    with pytest.raises(
        ConfigurationError, match=r"train= selects blocks\.0\.q_proj, whose weight is quantized already"
    ):
        quantize_weights(loaded(), Quantization(train=("*.q_proj",)))


def test_a_layer_that_was_never_quantized_is_refused() -> None:
    import bitsandbytes as bnb

    module = TinyLM()
    module.blocks[0].q_proj = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    with pytest.raises(ConfigurationError, match="it has no quantization state"):
        quantize_weights(module, Quantization())
