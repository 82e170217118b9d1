"""Which blocks are found in a model, whatever family it is of."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from recompute_helpers import Residual, Stack
from torch import nn

from lightning_memsave.errors import NothingToTransformError
from lightning_memsave.transforms.blocks import find_blocks, is_callable, select_blocks

T = importlib.import_module("transformers")  # used by the tables below

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**TEXT, "num_key_value_heads": 2, "vocab_size": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 64}
SPEECH = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def found(model: nn.Module) -> dict[tuple[str, str], int]:
    """Return how many blocks of which class were found in which list."""
    return dict(Counter((block.group, type(block.module).__name__) for block in find_blocks(model)))


MODELS: dict[str, tuple[Any, dict[tuple[str, str], int]]] = {
    "llama": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)),
        {("model.layers", "LlamaDecoderLayer"): 3},
    ),
    "mixture of experts": (
        lambda: T.MixtralForCausalLM(T.MixtralConfig(**LLAMA, num_local_experts=8)),
        {("model.layers", "MixtralDecoderLayer"): 3},
    ),
    "bert": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)),
        {("bert.encoder.layer", "BertLayer"): 3},
    ),
    "gpt2": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64)),
        {("transformer.h", "GPT2Block"): 3},
    ),
    "t5": (
        lambda: T.T5ForConditionalGeneration(T.T5Config(**T5, num_layers=3)),
        {("encoder.block", "T5Block"): 3, ("decoder.block", "T5Block"): 3},
    ),
    "t5 of one layer": (
        lambda: T.T5ForConditionalGeneration(T.T5Config(**T5, num_layers=1)),
        {("encoder.block", "T5Block"): 1, ("decoder.block", "T5Block"): 1},
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 2, 3, 1])
        ),
        {
            ("resnet.embedder", "ResNetConvLayer"): 1,
            ("resnet.encoder.stages.0.layers", "ResNetBottleNeckLayer"): 1,
            ("resnet.encoder.stages.1.layers", "ResNetBottleNeckLayer"): 2,
            ("resnet.encoder.stages.2.layers", "ResNetBottleNeckLayer"): 3,
            ("resnet.encoder.stages.3.layers", "ResNetBottleNeckLayer"): 1,
        },
    ),
    "swin": (
        lambda: T.SwinForImageClassification(
            T.SwinConfig(embed_dim=8, depths=[1, 2, 6, 2], num_heads=[1, 2, 4, 8], window_size=4)
        ),
        {(f"swin.encoder.layers.{i}.blocks", "SwinLayer"): n for i, n in enumerate([1, 2, 6, 2])},
    ),
    "convnext": (
        lambda: T.ConvNextForImageClassification(T.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 3, 2])),
        {(f"convnext.encoder.stages.{i}.layers", "ConvNextLayer"): n for i, n in enumerate([2, 2, 3, 2])},
    ),
    "whisper": (
        lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(d_model=32, pad_token_id=0, **SPEECH, **HEADS)),
        {("model.encoder.layers", "WhisperEncoderLayer"): 2, ("model.decoder.layers", "WhisperDecoderLayer"): 3},
    ),
    "albert, one block called often": (
        lambda: T.AlbertModel(T.AlbertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)),
        {("encoder.albert_layer_groups.0.albert_layers", "AlbertLayer"): 1},
    ),
    "jamba, two classes in one list": (
        lambda: T.JambaForCausalLM(
            T.JambaConfig(**{**LLAMA, "num_hidden_layers": 4}, attn_layer_period=4, attn_layer_offset=3, num_experts=2)
        ),
        {("model.layers", "JambaMambaDecoderLayer"): 3, ("model.layers", "JambaAttentionDecoderLayer"): 1},
    ),
    "nn.Transformer": (
        lambda: nn.Transformer(32, 4, 2, 3, 64, batch_first=True),
        {("encoder.layers", "TransformerEncoderLayer"): 2, ("decoder.layers", "TransformerDecoderLayer"): 3},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_known_families_are_found(name):
    make, expected = MODELS[name]
    with torch.device("meta"):
        assert found(make()) == expected


def test_both_towers_of_a_composite_model_are_found():
    config = T.CLIPConfig(text_config={**TEXT, "vocab_size": 64}, vision_config={**TEXT, "num_hidden_layers": 2})
    with torch.device("meta"):
        groups = found(T.CLIPModel(config))
    assert sorted(groups.values()) == [2, 3]
    assert {group.split(".")[0] for group, _ in groups} == {"text_model", "vision_model"}


def test_vit_blocks_are_found():
    with torch.device("meta"):
        ((_, name), count) = next(iter(found(T.ViTForImageClassification(T.ViTConfig(**TEXT))).items()))
    assert (name, count) == ("ViTLayer", 3)


class DoubleConv(nn.Sequential):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(nn.Conv2d(inner, outer, 3), nn.BatchNorm2d(outer), nn.ReLU(), nn.Conv2d(outer, outer, 3))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.down1, self.down2 = DoubleConv(8, 16), DoubleConv(16, 32)
        self.middle = DoubleConv(32, 32)
        self.up1, self.up2 = DoubleConv(64, 16), DoubleConv(32, 8)
        self.head = nn.Conv2d(8, 1, 1)


def test_numbered_attributes_are_a_list_and_the_same_class_counts_elsewhere():
    assert [block.name for block in find_blocks(UNet())] == ["down1", "down2", "middle", "up1", "up2"]


class GraphLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Any) -> Any:
        return x * self.weight


def test_a_layer_with_its_own_weights_is_a_block_and_a_norm_is_not():
    model = nn.Module()
    model.conv1, model.conv2, model.norm1, model.norm2 = GraphLayer(), GraphLayer(), Scale(), Scale()
    assert [block.name for block in find_blocks(model)] == ["conv1", "conv2"]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Residual(2) for _ in range(8))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return x


def test_what_runs_in_parallel_inside_a_block_is_not_the_block():
    assert [block.name for block in find_blocks(nn.Sequential(*[Heads() for _ in range(3)]))] == ["0", "1", "2"]
    assert find_blocks(Heads()) == []


def test_twin_networks_are_searched_for_their_own_blocks():
    twins = nn.Module()
    twins.critic1, twins.critic2 = Stack(Residual), Stack(Residual)
    assert found(twins) == {("critic1.layers", "Residual"): 3, ("critic2.layers", "Residual"): 3}


@pytest.mark.parametrize("name", ["resnet", "swin", "t5"])
def test_no_block_is_inside_another_and_the_order_is_that_of_the_modules(name):
    with torch.device("meta"):
        model = MODELS[name][0]()
    blocks = [block.name for block in find_blocks(model)]
    order = [name for name, _ in model.named_modules()]
    assert blocks == sorted(blocks, key=order.index)
    assert not any(other.startswith(f"{block}.") for block in blocks for other in blocks)


def test_single_layers_in_a_row_are_no_blocks():
    assert find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())) == []
    assert find_blocks(nn.Linear(4, 4)) == []


def test_a_shared_block_is_found_once():
    block = Residual()
    assert [b.name for b in find_blocks(nn.ModuleDict({"a": nn.ModuleList([block, block, Residual()])}))] == [
        "a.0",
        "a.2",
    ]


def test_selection_by_pattern_takes_the_outermost_and_knows_what_is_called():
    model = Stack(Residual)
    assert [b.name for b in select_blocks(model, ("layers.*",), subject="X")] == ["layers.0", "layers.1", "layers.2"]
    assert [b.group for b in select_blocks(model, ("Linear",), subject="X")][:2] == ["layers.0", "layers.0"]
    assert not is_callable(model.layers)
    assert is_callable(model)
    with pytest.raises(NothingToTransformError, match=r"X: modules=.auto. found no repeated blocks in Linear"):
        select_blocks(nn.Linear(2, 2), ("auto",), subject="X")
    with pytest.raises(NothingToTransformError, match=r"'layer.0'.*Nearest names and classes: 'layers.0'"):
        select_blocks(model, ("layer.0",), subject="X")
