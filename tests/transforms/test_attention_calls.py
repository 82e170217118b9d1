"""Attention calls in a step: what reaches torch, and that results and gradients are those of the plain call."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._attention_kernels import SDPACall, kernel_of, why_not
from lightning_memsave.transforms._attention_mode import AttentionMode, shown_layers

# The worst difference seen between the CPU's flash and math kernels in fp64 here, gradients included, is 5.7e-15.
TOLERANCE = 1e-12
B, H, KV, T, D = 2, 4, 2, 12, 8
TRIL = torch.ones(T, T, dtype=torch.bool).tril()


class Spy(TorchFunctionMode):
    """Keeps the arguments with which attention is called in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[SDPACall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(SDPACall.bind(args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def tensors(kv: int = H, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, T, D), (B, kv, T, D), (B, kv, T, D)]
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def run(attend: Any, mode: AttentionMode | None, *, kv: int = H) -> tuple[list[Tensor], list[SDPACall]]:
    """Return the output and the gradients, and the calls that reached torch."""
    given, spy = tensors(kv), Spy()
    with spy:
        if mode is None:
            with sdpa_kernel([SDPBackend.MATH]):
                out = attend(*given)
                out.square().sum().backward()
        else:
            with mode:
                out = attend(*given)
                out.square().sum().backward()
    return [out.detach(), *(t.grad for t in given)], spy.calls


def same(attend: Any, *, kv: int = H) -> tuple[SDPACall, AttentionMode]:
    """Check a function against the math kernel; return the call that reached torch."""
    mode = AttentionMode("auto", {})
    expected, _ = run(attend, None, kv=kv)
    found, calls = run(attend, mode, kv=kv)
    for e, f in zip(expected, found):
        torch.testing.assert_close(f, e, rtol=0, atol=TOLERANCE)
    return calls[0], mode


def padded() -> Tensor:
    keep = torch.ones(B, 1, 1, T, dtype=torch.bool)
    keep[0, ..., :3] = False
    return (keep & TRIL) | torch.eye(T, dtype=torch.bool)


MASKS = {
    "all true": (torch.ones(B, 1, T, T, dtype=torch.bool), (None, False)),
    "zeros": (torch.zeros(B, 1, 1, T, dtype=torch.float64), (None, False)),
    "causal": (TRIL, (None, True)),
    "causal, expanded": (TRIL.expand(B, 1, T, T), (None, True)),
    "causal float": (torch.zeros(T, T, dtype=torch.float64).masked_fill(~TRIL, -math.inf), (None, True)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_says_nothing_new_does_not_reach_the_kernel(name):
    mask, expected = MASKS[name]
    call, mode = same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))
    assert (call.mask, call.causal) == expected
    assert sum(mode.rewrites.values()) == 1


@pytest.mark.parametrize(
    "mask",
    [
        padded() | torch.eye(T, dtype=torch.bool),
        TRIL & ~TRIL.tril(-4),
        torch.linspace(-1, 1, T * T).view(T, T).double(),
    ],
    ids=["padding on the left", "window", "bias"],
)
def test_every_other_mask_reaches_the_kernel_as_it_is(mask):
    call, mode = same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert call.mask is mask
    assert not call.causal
    assert not mode.rewrites


def repeat_kv(x: Tensor) -> Tensor:
    return x[:, :, None].expand(B, KV, H // KV, T, D).reshape(B, H, T, D)


def repeat_tokens_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return x[:, :, :, None].expand(B, T, KV, H // KV, D).flatten(2, 3).transpose(1, 2)


REPEATS = {
    "expand and reshape": repeat_kv,
    "expand, tokens first": repeat_tokens_first,
    "repeat_interleave": lambda x: x.repeat_interleave(H // KV, dim=1),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, H // KV, 1),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_shared_again(name):
    repeat = REPEATS[name]
    call, mode = same(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True), kv=KV)
    assert call.gqa
    assert call.key.shape == call.value.shape == (B, KV, T, D)
    assert mode.rewrites == {"repeated key and value heads shared (enable_gqa=True)": 1}


def test_one_head_that_is_broadcast_is_shared():
    call, mode = same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), kv=1)
    assert call.gqa
    assert [kernel for kernel, *_ in mode.kernels] == ["flash"]


@pytest.mark.parametrize("mask", [None, TRIL.tril(-1) | torch.eye(T, dtype=torch.bool), padded()[:, 0]], ids=str)
def test_a_call_without_heads_runs_a_fused_kernel(mask):
    call, mode = same(lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], mask))
    assert call.query.shape == (B, 1, T, D)
    assert [kernel for kernel, *_ in mode.kernels] == ["flash"]


def cycled(x: Tensor) -> Tensor:
    return x[:, None].expand(B, H // KV, KV, T, D).reshape(B, H, T, D)  # heads in another order


def written(x: Tensor) -> Tensor:
    out = repeat_kv(x)
    with torch.no_grad():
        out[:, 1] += 1
    return out


def hooked(x: Tensor) -> Tensor:
    out = repeat_kv(x)
    out.register_hook(lambda grad: grad * 2)
    return out


def cut(x: Tensor) -> Tensor:
    with torch.no_grad():
        return repeat_kv(x)


@pytest.mark.parametrize("repeat", [cycled, written, hooked, lambda x: repeat_kv(x).flip(1)])
def test_heads_that_are_not_simply_repeated_stay(repeat):
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v))  # noqa: E731
    call, mode = same(attend, kv=KV)
    assert not call.gqa
    assert call.key.shape == (B, H, T, D)
    assert not mode.rewrites


def test_a_repeat_without_gradients_gives_none():
    q, k, v = tensors(KV)
    with AttentionMode("auto", {}):
        F.scaled_dot_product_attention(q, cut(k), cut(v)).sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is None


def test_the_repeated_copy_is_freed_once_the_caller_lets_it_go():
    q, k, v = tensors(KV)
    with AttentionMode("auto", {}):
        key, value = repeat_kv(k), repeat_kv(v)
        gone = [weakref.ref(key), weakref.ref(value)]
        out = F.scaled_dot_product_attention(q, key, value)
        del key, value
        gc.collect()
    assert [ref() for ref in gone] == [None, None]
    out.sum().backward()


def saved_bytes(mode: AttentionMode | None) -> int:
    q, k, v = tensors(KV)
    total: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        total[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if mode is None:
            out = F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)
        else:
            with mode:
                out = F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)
    out.sum().backward()
    return sum(total.values())


def test_shared_heads_save_what_the_docstring_says():
    assert saved_bytes(None) - saved_bytes(AttentionMode("auto", {})) == 2 * B * (H - KV) * T * D * 8


def test_q_k_and_v_of_different_dtypes_run_in_the_narrowest():
    q, k, v = tensors(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        F.scaled_dot_product_attention(q, k, v.bfloat16())
    mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)
    mask[0] = torch.finfo(torch.float32).min  # a query that sees nothing
    mode = AttentionMode("auto", {})
    with mode:
        out = F.scaled_dot_product_attention(q, k, v.bfloat16(), mask)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    assert mode.rewrites == {"q, k and v of different dtypes cast to bfloat16": 1}


def test_fp32_calls_stay_fp32():
    q, k, v = tensors(dtype=torch.float32)
    with AttentionMode("auto", {}), Spy() as spy:
        F.scaled_dot_product_attention(q, k, v)
    assert spy.calls[0].query is q


def test_math_changes_no_call():
    mask = torch.ones(T, T, dtype=torch.bool)
    mode, spy, (q, k, v) = AttentionMode("math", {}), Spy(), tensors(KV)
    with sdpa_kernel([SDPBackend.MATH]), spy, mode:
        F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)
    assert spy.calls[0].mask is mask
    assert not spy.calls[0].gqa
    assert [kernel for kernel, *_ in mode.kernels] == ["math"]


# -- which kernel -----------------------------------------------------------------------------------------------------
def test_the_kernel_is_the_one_torch_takes():
    q, k, v = tensors()
    assert kernel_of(SDPACall(q, k, v, causal=True)) == "flash"
    assert kernel_of(SDPACall(q, k, v, dropout=0.1)) == "math"
    assert "dropout" in why_not(SDPACall(q, k, v, dropout=0.1), SDPBackend.FLASH_ATTENTION)
    assert why_not(SDPACall(q, k, v), SDPBackend.FLASH_ATTENTION) == ""
    assert why_not(SDPACall(q, k, v), SDPBackend.CUDNN_ATTENTION) == "the kernel exists on CUDA only"
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        assert kernel_of(SDPACall(q, k, v)) == ""


def test_the_call_is_judged_in_the_dtype_of_autocast():
    q, k, v = tensors(dtype=torch.float32)
    mode = AttentionMode("auto", {})
    with torch.autocast("cpu", dtype=torch.bfloat16), mode:
        F.scaled_dot_product_attention(q, k, v, attn_mask=torch.rand(T, T))
    assert [shown for _, shown, _ in mode.kernels] == [f"bfloat16, head_dim {D}, a dense float32 mask"]


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def test_layers_are_named_with_the_reason():
    model = nn.ModuleList([Attend(), Attend(), nn.Sequential(Attend())])
    mode = AttentionMode("auto", {id(m): n for n, m in model.named_modules()})
    with mode:
        model[0](*tensors())
        model[1](*tensors())
        F.scaled_dot_product_attention(*tensors())
    slow, fast = mode.kernels
    assert slow[0] == "math"
    assert "dropout" in slow[2]
    assert shown_layers(mode.kernels[slow]) == "2 Attend (0, 1)"
    assert shown_layers(mode.kernels[fast]) == "a function"


def test_a_kernel_that_cannot_run_is_refused_by_layer_and_reason():
    model = nn.Sequential(Attend())
    mode = AttentionMode("sdpa_flash", {id(m): n for n, m in model.named_modules()})
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), mode:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"'sdpa_flash' cannot run Attend \(0\): .*dropout"):
                model[0](*tensors())


# -- nn.MultiheadAttention --------------------------------------------------------------------------------------------
def multi_head(mode: Any, **given: Any) -> list[Tensor]:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, dtype=torch.float64)
    x = torch.randn(T, B, 16, dtype=torch.float64, requires_grad=True)
    with mode:
        out = layer(x, x, x, **given)[0]
        out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


FUTURE = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
PADDING = torch.zeros(B, T, dtype=torch.float64)
SOME = PADDING.clone()
SOME[0, -3:] = -math.inf
MULTI_HEAD = {
    "nothing": ({}, "no mask", 0),
    "no padding": ({"key_padding_mask": PADDING < 0}, "no mask", 1),
    "zeros": ({"attn_mask": torch.zeros(T, T, dtype=torch.float64)}, "no mask", 1),
    "causal": ({"attn_mask": FUTURE}, "causal", 1),
    "causal bool, no padding": ({"attn_mask": ~TRIL, "key_padding_mask": PADDING < 0}, "causal", 2),
    "hint": ({"attn_mask": FUTURE, "is_causal": True}, "causal", 0),
    "hint, no padding": ({"attn_mask": FUTURE, "is_causal": True, "key_padding_mask": PADDING}, "causal", 1),
    "wrong hint, no padding": (
        {"attn_mask": torch.zeros(T, T).double(), "is_causal": True, "key_padding_mask": PADDING},
        "a dense float64 mask",
        0,
    ),
    "padding": ({"key_padding_mask": SOME}, "a dense float64 mask", 0),
    "causal, padding": ({"attn_mask": FUTURE, "key_padding_mask": SOME}, "a dense float64 mask", 0),
}


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention_is_that_of_torch(name):
    given, shown, rewrites = MULTI_HEAD[name]
    mode = AttentionMode("auto", {})
    expected = multi_head(sdpa_kernel([SDPBackend.MATH]), need_weights=False, **given)
    found = multi_head(mode, need_weights=False, **given)
    for e, f in zip(expected, found):
        torch.testing.assert_close(f, e, rtol=0, atol=TOLERANCE)
    assert [words for _, words, _ in mode.kernels] == [f"float64, head_dim 8, {shown}"]
    assert sum(mode.rewrites.values()) == rewrites


def test_attention_weights_are_still_returned_and_said():
    mode = AttentionMode("auto", {})
    layer, x = nn.MultiheadAttention(16, 2), torch.randn(T, B, 16)
    expected = layer(x, x, x, attn_mask=~TRIL)
    with mode:
        found = layer(x, x, x, attn_mask=~TRIL)
    assert torch.equal(found[1], expected[1])
    assert shown_layers(mode.with_weights) == "MultiheadAttention"
    with AttentionMode("sdpa_flash", {}), pytest.raises(ConfigurationError, match="pass need_weights=False"):
        layer(x, x, x)


class Noted(Tensor):
    """A loss with a backward of its own."""

    backwards = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Noted.backwards += func is Tensor.backward
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_its_backward():
    x = torch.ones(2, requires_grad=True)
    with AttentionMode("auto", {}):
        (x * 2).sum().as_subclass(Noted).backward()
    assert Noted.backwards == 1
    assert torch.equal(x.grad, torch.full((2,), 2.0))


@pytest.mark.parametrize("start", ["Tensor.backward", "autograd.backward", "autograd.grad"])
def test_a_recompute_makes_the_calls_of_the_forward(start):
    (q, k, v), mode, spy = tensors(KV), AttentionMode("auto", {}), Spy()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), TRIL)

    with spy, mode:
        loss = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False).square().sum()
        if start == "Tensor.backward":
            loss.backward()
        elif start == "autograd.backward":
            torch.autograd.backward([loss])
        else:
            q.grad, k.grad, v.grad = torch.autograd.grad(loss, [q, k, v])
    assert [(c.mask, c.causal, c.gqa) for c in spy.calls] == [(None, True, True)] * 2
    found = [t.grad for t in (q, k, v)]
    expected, _ = run(attend, None, kv=KV)
    for e, f in zip(expected[1:], found):
        torch.testing.assert_close(f, e, rtol=0, atol=TOLERANCE)


# -- what is left alone -----------------------------------------------------------------------------------------------
def test_tensors_without_values_are_left_as_they_are():
    mode, x = AttentionMode("auto", {}), torch.empty(B, H, T, D, device="meta")
    with mode:
        assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
    assert mode.left == 1


def test_calls_inside_of_torch_func_are_left_as_they_are():
    mode, mask = AttentionMode("auto", {}), torch.ones(T, T, dtype=torch.bool)
    with mode:
        torch.func.vmap(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))(*tensors())
    assert mode.left == 1
    assert not mode.kernels


def test_compiled_regions_are_left_as_they_are():
    mask, mode = torch.ones(T, T, dtype=torch.bool), AttentionMode("auto", {})
    attend = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), backend="aot_eager", fullgraph=True
    )
    given = tensors()
    with mode:
        found = attend(*given)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*given, mask), rtol=0, atol=TOLERANCE)
    assert not mode.kernels
    assert not mode.rewrites
