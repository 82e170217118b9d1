"""Recomputed blocks of transformers models: equal numbers, key/value caches, their own checkpointing."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms.checkpoint_blocks import checkpoint_blocks, recompute_counts

T = importlib.import_module("transformers")

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**TEXT, "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**TEXT, "image_size": 32, "patch_size": 8}
SPEECH = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}


def padded() -> dict[str, Any]:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": ids(), "attention_mask": mask, "labels": ids(), "use_cache": False}


def speech() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32), "labels": ids(), "use_cache": False}


MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA, attention_dropout=0.1)), padded),
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
        ),
        padded,
    ),
    "bert": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT, vocab_size=64)),
        lambda: {"input_ids": ids(), "labels": torch.tensor([0, 1])},
    ),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE)), pixels),
    "resnet": (
        lambda: T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2])),
        pixels,
    ),
    "swin": (
        lambda: T.SwinForImageClassification(
            T.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4)
        ),
        pixels,
    ),
    "clip": (
        lambda: T.CLIPModel(T.CLIPConfig(text_config={**TEXT, "vocab_size": 64, **TOKENS}, vision_config=IMAGE)),
        lambda: {"input_ids": ids(), "pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True},
    ),
    "whisper": (
        lambda: T.WhisperForConditionalGeneration(
            T.WhisperConfig(
                d_model=32, num_mel_bins=8, max_source_positions=16, dropout=0.1, **SPEECH, **HEADS, **TOKENS
            )
        ),
        speech,
    ),
}


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **{name: b.clone() for name, b in model.named_buffers()}}


def pair(name: str = "llama", **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    torch.manual_seed(0)
    make, batch = MODELS[name]
    plain = make()
    model = copy.deepcopy(plain)
    checkpoint_blocks(model, **options)
    return plain, model, batch()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("policy", ["full", "selective", "every_n"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bitwise_equal(name, policy, training):
    plain, model, batch = pair(name, policy=policy)
    expected, got = gradients(plain.train(training), batch), gradients(model.train(training), batch)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert all(c.calls == c.recomputed == 1 for c in recompute_counts(model).values())


@pytest.mark.parametrize("name", ["llama", "t5", "whisper"])
def test_a_cache_the_model_makes_in_training_is_left_empty(name):
    plain, model, batch = pair(name)
    expected = gradients(plain.train(), batch)
    output = model.train()(**{**batch, "use_cache": True})
    assert output.past_key_values.get_seq_length() == 0
    model.zero_grad()
    got = gradients(model, {**batch, "use_cache": True})
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_cache_that_holds_tokens_is_refused_with_gradients_and_works_without():
    _, model, batch = pair()
    with torch.no_grad():
        cache = model(input_ids=batch["input_ids"], use_cache=True).past_key_values
    assert cache.get_seq_length() == 8
    with pytest.raises(ConfigurationError, match=r"'model.layers.0' was given a key/value cache that already holds"):
        model(input_ids=batch["input_ids"], past_key_values=cache)
    with torch.no_grad():
        assert model(input_ids=batch["input_ids"], past_key_values=cache).past_key_values.get_seq_length() == 16


def test_generation_is_unchanged():
    plain, model, batch = pair()
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        plain.eval().generate(batch["input_ids"], **arguments), model.eval().generate(batch["input_ids"], **arguments)
    )


def test_the_models_own_checkpointing_is_replaced_and_put_back():
    make, batch = MODELS["llama"]
    model = make().train()
    model.activation_checkpointing_enable() if hasattr(
        model, "activation_checkpointing_enable"
    ) else model.gradient_checkpointing_enable({"use_reentrant": False})
    own = [m.gradient_checkpointing for m in model.model.layers]
    applied = checkpoint_blocks(model)
    assert "the model's own gradient_checkpointing is off meanwhile" in applied.summary
    gradients(model, batch())
    assert all(c.calls == c.recomputed == 1 for c in recompute_counts(model).values())
    applied.undo()
    assert [m.gradient_checkpointing for m in model.model.layers] == own == [True] * 3


@pytest.mark.parametrize("pattern", ["*.mlp", "LlamaDecoderLayer"])
def test_a_pattern_over_blocks_that_recompute_themselves_is_refused(pattern):
    model = MODELS["llama"][0]()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    with pytest.raises(
        ConfigurationError, match=r"already recomputes its layers itself \(gradient_checkpointing=True\)"
    ):
        checkpoint_blocks(model, (pattern,))
    assert recompute_counts(model) == {}
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_adapters_over_a_frozen_base_train_in_every_layer():
    peft = importlib.import_module("peft")
    model = MODELS["llama"][0]()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    checkpoint_blocks(adapted)
    adapted(**padded()).loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 * 2
    assert all(grad is not None for grad in trained.values())
    assert all(grad.abs().sum() > 0 for name, grad in trained.items() if "lora_B" in name)
