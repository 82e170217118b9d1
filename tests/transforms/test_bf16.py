"""The cast to bf16: what is cast, what stays, and how fp32 modules compute inside a bf16 model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import TinyLM
from torch import Tensor, nn

from lightning_memsave.errors import NothingToTransformError
from lightning_memsave.transforms.bf16 import NORMS, cast_to_bf16, is_norm, is_rotary, is_router

BF16, FP32 = torch.bfloat16, torch.float32


class RMSNorm(nn.Module):
    """Returns fp32 when its weight is fp32, as many do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return x * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class Experts(nn.Module):
    def __init__(self, width: int, num: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(num))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).softmax(-1)
        return sum(chosen[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = 1 / 10000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(x.shape[-2], dtype=FP32)[:, None] * self.inv_freq
        return angles.cos(), angles.sin()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.rotary = RotaryEmbedding(32)
        self.input_norm = RMSNorm(16)
        self.gate_proj = nn.Linear(16, 16)
        self.moe = Experts(16, 4)
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("table", torch.randn(16))
        self.register_buffer("count", torch.arange(3))
        self.head = nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        cos, sin = self.rotary(x)
        x = x * cos + x * sin + self.table
        x = self.gate_proj(self.input_norm(x)) * self.scale
        return self.head(self.moe(x))


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in [*module.named_parameters(), *module.named_buffers()]}


def test_norms_routers_and_rotary_tables_stay_and_everything_runs() -> None:
    module = Mixed()
    parameters = dict(module.named_parameters())
    cast = cast_to_bf16(module, [NORMS])
    found = dtypes(module)
    assert {name for name, dtype in found.items() if dtype == FP32} == {
        "rotary.inv_freq",
        "input_norm.weight",
        "moe.gate.weight",
    }
    assert found["count"] == torch.int64
    assert cast.kept == ["rotary", "input_norm", "moe.gate"]
    assert dict(module.named_parameters()) == parameters, "the same parameter objects"
    assert cast.bytes_before == sum(4 * p.numel() for p in parameters.values())
    assert cast.bytes_after == sum(p.nbytes for p in parameters.values())
    seen: dict[str, Any] = {}
    module.rotary.register_forward_hook(lambda m, a, out: seen.update(rotary=[t.dtype for t in out]))
    out = module(torch.arange(8))
    out.float().sum().backward()
    assert out.dtype == BF16
    assert seen["rotary"] == [BF16, BF16]
    assert module.input_norm.seen == [FP32], "norms compute in fp32"
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


def test_the_outputs_are_those_of_fp32_to_bf16_precision() -> None:
    module = Mixed()
    expected = module(torch.arange(8))
    cast_to_bf16(module, [NORMS])
    # 8 bits of mantissa; worst seen 5e-3
    torch.testing.assert_close(module(torch.arange(8)).float(), expected, rtol=0.02, atol=0.02)


def test_casting_again_changes_nothing() -> None:
    module = Mixed()
    cast_to_bf16(module, [NORMS])
    before = dtypes(module)
    cast = cast_to_bf16(module, [NORMS])
    assert dtypes(module) == before
    assert not cast.trained
    assert len(cast.known) == len([p for p in module.parameters() if p.dtype == BF16])
    assert len(module.input_norm._forward_pre_hooks) == len(module.input_norm._forward_hooks) == 1


def test_a_deep_copy_computes_alike_on_its_own_weights() -> None:
    module = Mixed()
    cast_to_bf16(module, [NORMS])
    other = copy.deepcopy(module)
    ids = torch.arange(8)
    assert torch.equal(module(ids), other(ids))
    with torch.no_grad():
        other.input_norm.weight.zero_()
    assert not torch.equal(module(ids), other(ids))


def test_users_patterns_select_names_classes_and_whole_parts() -> None:
    module = TinyLM()
    cast = cast_to_bf16(module, ["head", "Embedding", "blocks.1"])
    assert cast.kept == ["embedding", "blocks.1", "head"]
    kept = {name for name, p in module.named_parameters() if p.dtype == FP32}
    assert kept == {n for n, _ in module.named_parameters() if n.startswith(("embedding", "blocks.1", "head"))}
    assert module(torch.arange(8)[None]).dtype == BF16


def test_a_module_that_shares_a_kept_weight_is_kept_too() -> None:
    module = TinyLM(tied=True)
    cast = cast_to_bf16(module, [NORMS, "embedding"])
    assert "head" in cast.kept
    assert module.head.weight is module.embedding.weight
    assert module.head.weight.dtype == FP32
    module(torch.arange(8)[None]).float().sum().backward()


def test_unknown_patterns_raise_and_the_norms_do_not_have_to_exist() -> None:
    cast_to_bf16(nn.Sequential(nn.Linear(2, 2)), [NORMS])
    with pytest.raises(NothingToTransformError, match="keep_fp32='nothing' matched none"):
        cast_to_bf16(nn.Sequential(nn.Linear(2, 2)), [NORMS, "nothing"])


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("ln_1", nn.LayerNorm(2), True),
        ("bn", nn.BatchNorm2d(2), True),
        ("gn", nn.GroupNorm(1, 2), True),
        ("x", nn.InstanceNorm1d(2, affine=True), True),
        ("block.norm", RMSNorm(2), True),
        ("norm_projection", nn.Linear(2, 2), False),
        ("normalizing_flow", nn.Sequential(nn.Linear(2, 2)), False),
        ("mlp", nn.Linear(2, 2), False),
    ],
)
def test_what_a_norm_is(name, module, expected) -> None:
    assert is_norm(name, module) == expected


def test_what_a_router_and_a_rotary_table_are() -> None:
    experts, plain = Experts(4, 2), Mixed()
    assert is_router("moe.gate", experts.gate, experts)
    assert is_router("mlp.router", nn.Linear(4, 2), nn.Module())
    assert not is_router("mlp.gate", nn.Linear(4, 4), plain)
    assert not is_router("mlp.gate_proj", plain.gate_proj, experts)
    assert is_rotary("rope", RotaryEmbedding(4))
    assert not is_rotary("rotary", nn.Linear(2, 2))


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_layers_run(training) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    vision = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU())
    recurrent = nn.LSTM(8, 8, num_layers=2)
    for module, x in (
        (layer, torch.randn(2, 5, 16)),
        (vision, torch.randn(2, 3, 8, 8)),
        (recurrent, torch.randn(5, 2, 8)),
    ):
        module.train(training)
        expected = module(x)
        cast_to_bf16(module, [NORMS])
        with torch.set_grad_enabled(training):
            out = module(x.to(BF16))
        out, expected = (out[0], expected[0]) if isinstance(out, tuple) else (out, expected)
        assert out.dtype == BF16
        # worst seen 0.02
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert vision[1].running_mean.dtype == FP32


def test_metrics_quantized_and_complex_values_are_left_alone() -> None:
    from torchmetrics import MeanMetric

    module = nn.Module()
    module.metric = MeanMetric()
    module.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    module.phase = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    module.layer = nn.Linear(2, 2)
    module.metric.update(1.0)
    cast_to_bf16(module, [NORMS])
    assert module.packed.dtype == torch.uint8
    assert module.phase.dtype == torch.complex64
    assert module.metric.compute().dtype == FP32
    assert module.layer.weight.dtype == BF16


def test_frozen_parameters_are_cast_without_a_master() -> None:
    module = TinyLM()
    module.embedding.requires_grad_(False)
    kept: list[nn.Parameter] = []

    def keep(p: nn.Parameter, values: Tensor) -> Tensor:
        assert values.dtype == FP32
        kept.append(p)
        return values.to(BF16)

    cast = cast_to_bf16(module, [NORMS], keep)
    assert cast.frozen == 1
    assert [id(p) for p in kept] == [id(p) for p in cast.trained]
    assert not any(p is module.embedding.weight for p in kept)


def test_nested_inputs_of_a_kept_module_are_converted() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, pair: Any, *, extra: Any) -> Any:
            assert pair[0].dtype == extra["x"].dtype == FP32
            assert pair[1].dtype == torch.int64
            return {"out": [pair[0] * self.weight, pair[1]], "none": None}

    module = nn.Sequential(Takes())
    cast_to_bf16(module, ["0"])
    out = module[0]((torch.ones(2, dtype=BF16), torch.arange(2)), extra={"x": torch.ones(2, dtype=BF16)})
    assert out["out"][0].dtype == BF16
    assert out["out"][1].dtype == torch.int64
    assert out["none"] is None
