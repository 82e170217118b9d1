"""``AttentionKernel`` in a Trainer."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_memsave import (
    ActivationCheckpointing,
    AttentionKernel,
    ChunkedLoss,
    LoRA,
    MemoryAudit,
    TiledCompute,
    apply,
)
from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms import _attention_models
from lightning_memsave.transforms._attention_models import ModelsChange
from lightning_memsave.transforms.attention import AttentionRun

# Flash and math kernel in fp64, three steps of AdamW: 8.9e-16 is the worst difference of a loss seen, 2.4e-13 of a
# weight (a key's bias, whose gradient is rounding only).
TOLERANCE = 1e-10
# transformers' eager attention takes the softmax in fp32: 1e-8 is the worst difference of a loss seen.
EAGER = 1e-6
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def fit(module: Any, *callbacks: Any, namespace: str = NAMESPACES[0], **trainer: Any) -> Any:
    torch.manual_seed(1)
    made = make_trainer(importlib.import_module(namespace), callbacks=list(callbacks), **trainer)
    made.fit(module, make_loader())
    return made


def losses(module: Any) -> Tensor:
    return torch.tensor(module.losses, dtype=torch.float64)


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(losses(found), losses(expected), rtol=0, atol=tolerance)
    for (name, f), e in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(f, e, rtol=0, atol=tolerance, msg=name)
    assert list(found.state_dict()) == list(expected.state_dict())


def attributes(module: nn.Module) -> dict[str, list[str]]:
    """Everything of the children that a method could leave something on."""
    return {name: sorted(vars(child)) for name, child in module.named_modules() if name}


class MaskedBlock(nn.Module):
    """Attention the way much code calls it: a mask that is causal or hides nothing, and repeated heads."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (p(x).view(batch, tokens, -1, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(batch, 2, 2, tokens, 8).reshape(batch, 4, tokens, 8) for t in (k, v))
        mask = mask.tril() if self.causal else mask
        return x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Masked(LitLM):
    def _build(self) -> None:
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.blocks = nn.ModuleList([MaskedBlock(True), MaskedBlock(False)])
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embedding(batch)
        mask = torch.ones(len(batch), 1, batch.shape[1], batch.shape[1], dtype=torch.bool)
        for block in self.blocks:
            x = block(x, mask)
        x = self.encoder(x, src_key_padding_mask=torch.zeros_like(batch, dtype=torch.bool))
        return F.cross_entropy(self.head(x).flatten(0, 1), batch.flatten())


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_run_is_that_of_the_math_kernel_and_says_what_it_did(namespace, caplog):
    pl = importlib.import_module(namespace)
    kind = type("Masked", (Masked,), {}) if namespace == NAMESPACES[0] else None
    if kind is None:
        methods = {name: value for base in (LitLM, Masked) for name, value in vars(base).items() if "__" not in name}
        kind = type("Masked", (pl.LightningModule,), {**methods, "__init__": _init})
    plain, found = kind().double(), kind().double()
    with sdpa_kernel([SDPBackend.MATH]):
        fit(plain, namespace=namespace, precision="64-true")
    before = attributes(found)
    made = fit(found, AttentionKernel(), namespace=namespace, precision="64-true")
    assert_same(found, plain)
    assert {name: sorted(vars(m)) for name, m in found.named_modules() if name} == {
        k: v for k, v in before.items() if k
    }
    assert "training_step" not in vars(made.strategy)
    for line in (
        "flash: MaskedBlock (blocks.0), float64, head_dim 8, causal",
        "flash: MaskedBlock (blocks.1), MultiheadAttention (encoder.self_attn), float64, head_dim 8, no mask",
        "1 masks that hide nothing dropped",
        "1 causal masks replaced by is_causal=True",
        "2 repeated key and value heads shared (enable_gqa=True)",
        "1 padding masks that hide nothing dropped",
    ):
        assert line in caplog.text


def _init(self: Any) -> None:
    super(type(self), self).__init__()
    self.build_in, self.lr, self.losses = "init", 1e-3, []
    self._build()


@pytest.mark.parametrize(
    "others",
    [
        [ActivationCheckpointing(["MaskedBlock"])],
        [LoRA(modules=["*.q", "*.v"])],
        [
            LoRA(modules=["*.q", "*.v"]),
            ActivationCheckpointing(["MaskedBlock"]),
            ChunkedLoss(),
            TiledCompute(["encoder.norm?"], tile_tokens=4),
        ],
    ],
    ids=["checkpointing", "LoRA", "all"],
)
def test_other_methods_see_the_same_kernel(others):
    plain, found = Masked().double(), Masked().double()
    fit(plain, AttentionKernel("math"), *copy.deepcopy(others), precision="64-true")
    fit(found, AttentionKernel(), *copy.deepcopy(others), precision="64-true")
    assert_same(found, plain)


class Manual(Masked):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())


def test_manual_optimization_is_seen_once(caplog):
    plain, found = Manual().double(), Manual().double()
    with sdpa_kernel([SDPBackend.MATH]):
        fit(plain, precision="64-true")
    fit(found, AttentionKernel(), precision="64-true")
    assert_same(found, plain)
    assert "1 causal masks replaced" in caplog.text


def test_users_checkpoints_recompute_by_the_same_kernel():
    class Recomputed(Masked):
        def loss(self, batch: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().loss, batch, use_reentrant=False)

    plain, found = Masked().double(), Recomputed().double()
    fit(plain, AttentionKernel("math"), precision="64-true")
    fit(found, AttentionKernel(), precision="64-true")
    assert_same(found, plain)


def test_a_gradient_inside_of_the_step_recomputes_by_the_same_kernel():
    class Weighted(Masked):
        recompute = False

        def loss(self, batch: Tensor) -> Tensor:
            x = self.embedding(batch)
            mask = torch.ones(batch.shape[1], batch.shape[1], dtype=torch.bool)
            if self.recompute:
                y = torch.utils.checkpoint.checkpoint(self.blocks[0], x, mask, use_reentrant=False)
            else:
                y = self.blocks[0](x, mask)
            (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
            return (y * grad).mean()

    plain, found = Weighted().double(), Weighted().double()
    found.recompute = True
    fit(plain, AttentionKernel("math"), precision="64-true")
    fit(found, AttentionKernel(), precision="64-true")
    assert_same(found, plain)


def test_compiled_modules_are_left_as_they_are_and_said(caplog):
    plain, found = LitLM().double(), LitLM().double()
    fit(plain, precision="64-true")
    found.net.compile(backend="aot_eager")
    fit(found, AttentionKernel(), precision="64-true")
    assert_same(found, plain)
    assert "calls in modules compiled by torch.compile are left as they are" in caplog.text
    assert "Block (" not in caplog.text


def test_a_skipped_first_step_is_not_taken_for_a_model_without_attention(caplog):
    class Skips(LitLM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    with pytest.warns(UserWarning, match="returned `None`"):
        fit(Skips(), AttentionKernel())
    assert "flash: 2 Block" in caplog.text


def test_torchs_own_inference_path_of_encoders_is_taken_in_validation():
    class Encoder(Masked):
        def loss(self, batch: Tensor) -> Tensor:
            padding = torch.zeros_like(batch, dtype=torch.bool)
            padding[:, -2:] = True
            out = self.encoder(self.embedding(batch), src_key_padding_mask=padding)
            return out.square().mean()  # the inference path computes nothing for padding

    plain, found = Encoder(), Encoder()
    for module, callbacks in ((plain, []), (found, [AttentionKernel()])):
        module.encoder.requires_grad_(False)
        made = make_trainer(callbacks=callbacks)
        module.seen = made.validate(module, make_loader(), verbose=False)
    assert found.seen == plain.seen


def test_the_audit_sees_the_calls_that_reach_torch(tmp_path):
    module = Masked()
    fit(module, AttentionKernel(), MemoryAudit(), default_root_dir=tmp_path)
    found = json.loads((tmp_path / "memsave" / "audit.json").read_text())["findings"]
    shown = " ".join(f["text"] for f in found if f["check"] == "attention")
    assert "causal" in shown
    assert "dense" not in shown


def test_a_slow_kernel_that_comes_later_is_said_once(caplog):
    class Later(Masked):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx:
                q = torch.randn(1, 2, 8, 8)
                F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
            return super().training_step(batch, batch_idx)

    fit(Later(), AttentionKernel(), max_epochs=2)
    lines = [r.getMessage() for r in caplog.records if "dropout" in r.getMessage()]
    assert len(lines) == 1
    assert "math: Later, float32, head_dim 8, no mask, dropout (not flash: " in lines[0]


# -- kernels by name --------------------------------------------------------------------------------------------------
def test_math_runs_everywhere_and_flash_where_it_can(caplog):
    plain, math, flash = (LitLM().double() for _ in range(3))
    with sdpa_kernel([SDPBackend.MATH]):
        fit(plain, precision="64-true")
    fit(math, AttentionKernel("math"), precision="64-true")
    fit(flash, AttentionKernel("sdpa_flash"), precision="64-true")
    assert math.losses == plain.losses
    assert_same(flash, plain)
    assert "math: 2 Block (net.blocks.0, net.blocks.1), float64" in caplog.text
    assert "flash: 2 Block (net.blocks.0, net.blocks.1), float64" in caplog.text
    assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_kernel_that_cannot_run_a_layer_ends_the_run_by_name():
    with pytest.raises(ConfigurationError, match=r"'sdpa_flash' cannot run Block \(net.blocks.0\): .*dropout"):
        fit(LitLM(dropout=0.1), AttentionKernel("sdpa_flash"))
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("implementation", ["sdpa_efficient", "sdpa_cudnn", "flex"])
def test_a_kernel_that_the_device_lacks_is_refused_before_the_model_is_touched(implementation):
    with pytest.raises(ConfigurationError, match=f"{implementation!r} cannot run here: .* CPU|on cpu"):
        fit(LitLM(), AttentionKernel(implementation))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"implementation='flash' is not one of 'auto', 'flash_attention'"):
        AttentionKernel("flash")  # type: ignore[arg-type]


def test_a_step_without_attention_raises():
    class NoAttention(LitLM):
        def loss(self, batch: Tensor) -> Tensor:
            return self.net.head(self.net.embedding(batch)).mean()

    with pytest.raises(NothingToTransformError, match="the first step called no scaled_dot_product_attention"):
        fit(NoAttention(), AttentionKernel())


def test_validation_and_prediction_run_with_it():
    module = Masked()
    made = make_trainer(callbacks=[AttentionKernel()])
    made.fit(module, make_loader(), make_loader())
    expected = float(made.callback_metrics["val_loss"])
    assert made.validate(module, make_loader(), verbose=False)[0]["val_loss"] == pytest.approx(expected, abs=1e-6)


def test_the_callback_is_configuration_only():
    callback = AttentionKernel("math")
    fit(LitLM(), callback)
    assert vars(pickle.loads(pickle.dumps(callback))) == vars(copy.deepcopy(callback)) == {"implementation": "math"}


# -- Hugging Face models ----------------------------------------------------------------------------------------------
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class LitModel(LitLM):
    def __init__(self, model: Any, padding: int = 0) -> None:
        self.model_given, self.padding = model, padding
        super().__init__()

    def _build(self) -> None:
        pass

    def loss(self, batch: Tensor) -> Tensor:
        mask = torch.ones_like(batch)
        if self.padding:
            mask[0, -self.padding :] = 0
        labels = batch.masked_fill(mask == 0, -100)
        return self.model(input_ids=batch, attention_mask=mask, labels=labels, use_cache=False).loss


def lit_model(model: Any, **given: Any) -> LitModel:
    module = LitModel(None, **given)
    module.model = model.double().train()
    return module


def llama(implementation: str = "eager", **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=implementation, **options))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("made_with", ["eager", "sdpa"])
def test_a_hugging_face_model_runs_a_fused_kernel_and_gets_its_own_back(made_with, padding, caplog):
    plain, found = (lit_model(llama(made_with), padding=padding) for _ in range(2))
    with sdpa_kernel([SDPBackend.MATH]):
        fit(plain, precision="64-true")
    fit(found, AttentionKernel(), precision="64-true")
    if made_with == "sdpa":
        assert_same(found, plain)
    torch.testing.assert_close(losses(found), losses(plain), rtol=0, atol=EAGER)
    assert found.model.config._attn_implementation == made_with
    assert "flash: 2 LlamaAttention (model.model.layers.0.self_attn, model.model.layers.1.self_attn)" in caplog.text
    assert ("model runs sdpa, was eager" in caplog.text) == (made_with == "eager")
    assert ("2 repeated key and value heads shared" in caplog.text) == bool(padding)


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, attn_implementation="eager")
    return LlavaForConditionalGeneration(config)


def test_every_part_of_a_composite_model_is_set_and_put_back():
    model = llava()
    configs = [model.config, model.config.text_config, model.config.vision_config]
    applied = apply(model, [AttentionKernel()])
    assert [c._attn_implementation for c in configs] == ["sdpa"] * 3
    applied.undo()
    assert [c._attn_implementation for c in configs] == ["eager"] * 3


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, attn_implementation="eager"))  # 4.57 would take sdpa


def test_a_model_that_sdpa_would_change_stays_as_it_is(caplog):
    module = lit_model(gemma2())
    with pytest.raises(NothingToTransformError, match=r"model stays eager.*sdpa has no soft-capped scores"):
        fit(module, AttentionKernel(), precision="64-true")
    with pytest.raises(ConfigurationError, match=r"cannot be set on model \(Gemma2ForCausalLM\)"):
        fit(module, AttentionKernel("sdpa_flash"), precision="64-true")
    assert module.model.config._attn_implementation == "eager"


def test_output_attentions_keeps_the_scores():
    model = llama(output_attentions=True)
    applied = apply(model, [AttentionKernel()])
    assert model.config._attn_implementation == "eager"
    assert "stays eager" in next(iter(applied))[1].summary


def test_flash_attn_that_cannot_run_falls_back_in_one_line(caplog):
    module = lit_model(llama())
    fit(module, AttentionKernel("flash_attention"), precision="64-true")
    lines = [r.getMessage() for r in caplog.records if "flash-attn" in r.getMessage()]
    assert len(lines) == 1
    assert "flash-attn is not used: it runs on CUDA, and this run is on cpu. SDPA runs" in lines[0]
    assert "model runs sdpa, was eager" in lines[0]


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        ({4, 3, 2}, (10, 0), "flash_attention_4"),
        ({3, 2}, (9, 0), "flash_attention_3"),
        ({3, 2}, (10, 0), "flash_attention_2"),
        ({4, 2}, (8, 6), "flash_attention_2"),
        ({2}, (7, 5), ""),
        (set(), (9, 0), ""),
    ],
)
def test_the_newest_flash_attn_that_fits_the_gpu_is_taken(installed, capability, expected, monkeypatch):
    from transformers import utils

    for version in (2, 3, 4):
        monkeypatch.setattr(
            utils, f"is_flash_attn_{version}_available", lambda v=version: v in installed, raising=False
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found, problem = _attention_models._flash_attn("cuda", half=True)
    assert found == expected
    assert ("not installed" in problem) == (not expected)
    assert "16 bits" in _attention_models._flash_attn("cuda", half=False)[1]


def test_torchs_flash_kernel_is_that_of_flash_attn_for_the_run_only(monkeypatch):
    state = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None, raising=False)
    monkeypatch.setattr(
        torch.nn.attention, "restore_flash_attention_impl", lambda **_: state.append("restored"), raising=False
    )

    def activate(name: str) -> None:
        if name == "FA4":
            raise ImportError(name)
        state.append(name)

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
    run = AttentionRun(nn.Linear(2, 2), "flash_attention", ModelsChange())
    assert state == ["FA3"]
    run.close()
    run.close()
    assert state == ["FA3", "restored"]
    AttentionRun(nn.Linear(2, 2), "auto", ModelsChange()).close()
    assert state == ["FA3", "restored"]


def test_flex_is_set_and_put_back():
    model = llama()
    applied = apply(model, [AttentionKernel("flex")])
    assert model.config._attn_implementation == "flex_attention"
    applied.undo()
    assert model.config._attn_implementation == "eager"


def test_a_kernel_that_transformers_was_given_is_left_by_auto(caplog):
    model = llama("flex_attention")
    applied = apply(model, [AttentionKernel()])
    assert model.config._attn_implementation == "flex_attention"
    assert "stays on flex_attention, as it was made" in next(iter(applied))[1].summary


def test_without_a_trainer_only_hugging_face_models_are_set():
    with pytest.raises(NothingToTransformError, match="found no Hugging Face model"):
        apply(nn.Linear(2, 2), [AttentionKernel()])
    with pytest.raises(ConfigurationError, match="'sdpa_flash' is a setting of the steps"):
        apply(llama(), [AttentionKernel("sdpa_flash")])
    with pytest.raises(ConfigurationError, match="'flex' runs in Hugging Face models, and there is none"):
        apply(nn.Linear(2, 2), [AttentionKernel("flex")])
