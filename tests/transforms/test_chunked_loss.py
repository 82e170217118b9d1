"""Chunked cross entropy: the values and gradients of the plain one, in the bytes and the time it promises."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import Tensor

from lightning_memsave import ConfigurationError, chunked_cross_entropy
from lightning_memsave.memory.saved import record_saved_activations
from lightning_memsave.transforms._deferred_projection import LinearHead, Products
from lightning_memsave.transforms._deferred_tasks import CrossEntropy, Scale, Tanh
from lightning_memsave.transforms.chunked_loss import rows_in_chunk

V, D, N = 301, 24, 37
# fp32 against fp64: worst seen 6.2e-7 of the largest value, with a soft-cap.
TOLERANCE = 1e-6
# bf16 products against fp64 on the same rounded inputs, of the largest value: worst seen 3.9e-3 in gradients (one
# rounding of the product and one of dz), 4.1e-4 in losses.
BF16_GRADIENT, BF16_LOSS = 1e-2, 1e-3

CASES = list(
    itertools.product(("mean", "sum", "none"), (False, True), (0.0, 0.1), (False, True), (None, 5.0), (0.0, 1e-2))
)


def case(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(N, D, generator=generator).to(dtype),
        "weight": (torch.randn(V, D, generator=generator) * 0.3).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "class_weight": torch.rand(V, generator=generator),
        "target": torch.randint(0, V, (N,), generator=generator),
    }


def reference(
    given: dict[str, Tensor],
    reduction: str,
    smoothing: float = 0.0,
    weighted: bool = False,
    softcap: float | None = None,
    z_loss: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """The loss as its definition says, in the dtype of the inputs."""
    z = F.linear(given["hidden"], given["weight"], given.get("bias")) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    weight = given["class_weight"].to(z.dtype) if weighted else None
    target, counts = given["target"], given["target"] != -100
    losses = F.cross_entropy(z, target, weight, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * z.logsumexp(-1).square() * counts
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (counts.sum() if weight is None else (weight[target.clamp_min(0)] * counts).sum())


def gradients(loss: Tensor, given: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
    return list(torch.autograd.grad(loss, [given[name] for name in names], upstream))


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def in_double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().double() if v.is_floating_point() else v for k, v in given.items()}


def requiring(given: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    for name in names:
        given[name].requires_grad_()
    return given


# -- values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trained", [["hidden", "weight", "bias"], ["hidden"], ["weight"], []], ids=str)
def test_losses_and_gradients_are_the_plain_ones_to_1e_6(trained: list[str]) -> None:
    worst = 0.0
    for reduction, ignored, smoothing, weighted, softcap, z_loss in CASES:
        given = requiring(case(), trained)
        if ignored:
            given["target"][::3] = -100
        exact = requiring(in_double(given), trained)
        expected = reference(exact, reduction, smoothing, weighted, softcap, z_loss, 1.5)
        found = chunked_cross_entropy(
            given["hidden"], given["weight"], given["target"], bias=given["bias"], reduction=reduction,
            class_weight=given["class_weight"] if weighted else None, label_smoothing=smoothing, softcap=softcap,
            z_loss=z_loss, scale=1.5, chunk_tokens=8,
        )  # fmt: skip
        worst = max(worst, deviation(found.detach(), expected.detach()))
        if trained:
            pairs = zip(gradients(found, given, trained), gradients(expected, exact, trained))
            worst = max(worst, *(deviation(a, b) for a, b in pairs))
    assert worst < TOLERANCE


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_passes_in_fp64(reduction: str, softcap: float | None) -> None:
    given = {k: v[:5].double() if v.is_floating_point() and v.shape[0] == N else v for k, v in case().items()}
    weight, bias = given["weight"][:11].double(), given["bias"][:11].double()
    target = torch.tensor([0, 10, -100, 4, 4])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_cross_entropy(
            hidden, weight, target, bias=bias, reduction=reduction, softcap=softcap, label_smoothing=0.1, z_loss=0.01,
            class_weight=given["class_weight"][:11].double(), chunk_tokens=2,
        )  # fmt: skip

    inputs = [t.detach().requires_grad_() for t in (given["hidden"], weight, bias)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("chunk_tokens", [1, 7, N, 10 * N, "auto"])
def test_the_size_of_a_chunk_changes_nothing_but_the_order_of_sums(chunk_tokens: Any) -> None:
    given = requiring(case(), ["hidden", "weight"])
    found = chunked_cross_entropy(given["hidden"], given["weight"], given["target"], chunk_tokens=chunk_tokens)
    exact = in_double(given)
    del exact["bias"]
    assert deviation(found.detach(), reference(exact, "mean")) < TOLERANCE


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_products_keep_an_fp32_loss_and_the_named_bound(autocast: bool) -> None:
    names = ["hidden", "weight", "bias"]
    given = requiring(case(dtype=torch.float32 if autocast else torch.bfloat16), names)
    rounded = {k: v.detach().bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    exact = requiring(in_double(rounded), names)
    expected = reference(exact, "mean")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = chunked_cross_entropy(
            given["hidden"], given["weight"], given["target"], bias=given["bias"], chunk_tokens=8
        )
    assert found.dtype == torch.float32
    assert deviation(found.detach(), expected.detach()) < BF16_LOSS
    for ours, theirs, name in zip(gradients(found, given, names), gradients(expected, exact, names), names):
        assert ours.dtype == given[name].dtype
        assert deviation(ours, theirs) < BF16_GRADIENT


def test_a_16_bit_weight_gradient_is_summed_in_fp32() -> None:
    # the same row 512 times: a bf16 sum would stop at 256 times its first term
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.int64), reduction="sum", chunk_tokens=1)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


def test_fp16_gradients_do_not_underflow_below_a_loss_scale() -> None:
    given = requiring(case(dtype=torch.float16), ["hidden", "weight"])
    hidden = given["hidden"].repeat(200, 1).detach().requires_grad_()
    loss = chunked_cross_entropy(hidden, given["weight"], given["target"].repeat(200), chunk_tokens=512)
    (loss * 2.0**12).backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).float().mean() < 0.01, "each is near 1e-5 before the scale"


def test_hidden_states_of_any_shape_give_losses_of_that_shape() -> None:
    given = case()
    hidden, target = given["hidden"][:36].view(3, 4, 3, D), given["target"][:36].view(3, 4, 3)
    found = chunked_cross_entropy(hidden, given["weight"], target, reduction="none", chunk_tokens=5)
    expected = F.cross_entropy((hidden @ given["weight"].T).movedim(-1, 1), target, reduction="none")
    torch.testing.assert_close(found, expected)


def test_where_every_row_is_ignored_the_loss_is_nan_and_gradients_are_zero_as_in_torch() -> None:
    given = requiring(case(), ["hidden", "weight"])
    target = torch.full((N,), -100)
    loss = chunked_cross_entropy(given["hidden"], given["weight"], target)
    loss.backward()
    assert loss.isnan()
    assert not given["hidden"].grad.any()
    assert not given["weight"].grad.any()


def test_a_class_that_does_not_exist_raises_as_in_torch() -> None:
    given = case()
    given["target"][3] = V
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_cross_entropy(given["hidden"], given["weight"], given["target"])


# -- autograd --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_gives_the_same_gradients_again(reduction: str) -> None:
    given = requiring(case(), ["hidden", "weight"])
    loss = chunked_cross_entropy(given["hidden"], given["weight"], given["target"], reduction=reduction).sum() * 3
    loss.backward(retain_graph=True)
    first = [given[name].grad.clone() for name in ("hidden", "weight")]
    loss.backward()
    for name, gradient in zip(("hidden", "weight"), first):
        torch.testing.assert_close(given[name].grad, 2 * gradient, rtol=0, atol=0)


def test_a_second_backward_without_a_kept_graph_is_refused() -> None:
    given = requiring(case(), ["hidden", "weight"])
    loss = chunked_cross_entropy(given["hidden"], given["weight"], given["target"])
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused() -> None:
    given = requiring(case(), ["hidden"])
    loss = chunked_cross_entropy(given["hidden"], given["weight"], given["target"])
    with pytest.raises(ConfigurationError, match="gradient of the gradient"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


def test_the_weight_gradient_is_given_away_and_not_copied() -> None:
    given = requiring(case(), ["weight"])
    loss = chunked_cross_entropy(given["hidden"], given["weight"], given["target"])
    loss.backward(inputs=[given["weight"]])
    held = loss.grad_fn
    assert given["weight"].grad.untyped_storage().nbytes() == V * D * 4
    assert getattr(held, "of_tensors", None) is None, "autograd's node holds no second reference"


def test_a_compiled_caller_gets_the_plain_operations() -> None:
    given = requiring(case(), ["hidden"])
    given["target"][::5] = -100

    @torch.compile(backend="eager", fullgraph=True)
    def loss(hidden: Tensor) -> Tensor:
        return chunked_cross_entropy(
            hidden, given["weight"], given["target"], class_weight=given["class_weight"], z_loss=0.01, softcap=4.0
        )

    expected = chunked_cross_entropy(
        given["hidden"], given["weight"], given["target"], class_weight=given["class_weight"], z_loss=0.01, softcap=4.0
    )
    torch.testing.assert_close(loss(given["hidden"]), expected)


# -- bytes -----------------------------------------------------------------------------------------------------------
ROWS, CLASSES, WIDTH, CHUNK = 256, 4096, 16, 32


def _problem(trained: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(CLASSES, WIDTH).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randint(0, CLASSES, (ROWS,))


@pytest.mark.parametrize("rows", [ROWS, 4 * ROWS])
def test_saved_bytes_are_the_gradient_of_the_hidden_states(rows: int) -> None:
    weight = torch.nn.Linear(WIDTH, CLASSES, bias=False)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    with record_saved_activations(weight) as saved:
        loss = chunked_cross_entropy(hidden, weight.weight, torch.zeros(rows, dtype=torch.int64), chunk_tokens=CHUNK)
    assert saved.num_bytes == rows * WIDTH * 4 + 4, "and the 4 bytes of the mean's factor"
    assert [t.nbytes for t in loss.grad_fn.of_tensors if t is not None] == [CLASSES * WIDTH * 4]


def test_a_frozen_head_has_no_weight_gradient() -> None:
    hidden, weight, target = _problem(trained=False)
    loss = chunked_cross_entropy(hidden, weight, target, chunk_tokens=CHUNK)
    assert loss.grad_fn.of_tensors == [None, None]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_one_chunk_and_the_gradients(trained: bool, dtype: torch.dtype) -> None:
    hidden, weight, target = _problem(trained, dtype)
    with LiveBytes() as live:
        loss = chunked_cross_entropy(hidden, weight, target, chunk_tokens=CHUNK)
        loss.backward()
    wide = dtype == torch.float32
    chunk = CHUNK * CLASSES * (4 if wide else 6)
    gradients = ROWS * WIDTH * dtype.itemsize
    # fp32 sum, and one 16-bit product that is added to it
    head = trained * CLASSES * WIDTH * (4 if wide else 6)
    small = 64 * ROWS + 8 * CHUNK * WIDTH
    assert chunk + gradients + head // 2 < live.peak < chunk + gradients + head + small
    plain = ROWS * CLASSES * 4
    assert live.peak < plain


def test_ignored_rows_are_dropped_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = CrossEntropy.value_and_grad

    def count(self: CrossEntropy, z: Tensor, rows: slice, upstream: Tensor | None) -> Tensor:
        seen.append(z.shape[0])
        return real(self, z, rows, upstream)

    monkeypatch.setattr(CrossEntropy, "value_and_grad", count)
    hidden, weight, target = _problem(trained=True)
    target[40:] = -100
    chunked_cross_entropy(hidden, weight, target, chunk_tokens=CHUNK)
    assert seen == [32, 8]


@pytest.mark.parametrize(
    ("rows", "classes", "expected"), [(1024, 49152, 256), (1000, 49152, 250), (16, 49152, 16), (10**6, 10**6, 64)]
)
def test_auto_chunks_are_equal_and_bounded(rows: int, classes: int, expected: int) -> None:
    chunk = rows_in_chunk(rows, classes, torch.device("cpu"))
    assert chunk == expected
    assert chunk * classes * 4 <= max(64 << 20, 64 * classes * 4)


@pytest.mark.slow
def test_the_time_is_at_most_1_3_of_the_plain_loss_on_the_head_of_smollm2() -> None:
    rows, classes, width = 1024, 49152, 576
    weight = (torch.randn(classes, width) * 0.02).requires_grad_()
    states, target = torch.randn(rows, width), torch.randint(0, classes, (rows,))

    def seconds(loss_of: Any) -> float:
        weight.grad = None
        hidden = states.clone().requires_grad_()
        start = time.process_time()
        loss_of(hidden).backward()
        return time.process_time() - start

    # Side by side, so that a busy machine slows both. Seen: 0.87.
    ratios = []
    for _ in range(3):
        plain = seconds(lambda hidden: F.cross_entropy(F.linear(hidden, weight), target))
        ratios.append(seconds(lambda hidden: chunked_cross_entropy(hidden, weight, target)) / plain)
    assert statistics.median(ratios) < 1.3


# -- backends --------------------------------------------------------------------------------------------------------
needs_torch_operator = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no F.linear_cross_entropy"
)


@needs_torch_operator
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_operator_of_torch_gives_the_same(reduction: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *a, **k: calls.append(k["options"]) or real(*a, **k))
    names = ["hidden", "weight", "bias"]
    given = requiring(case(), names)
    given["target"][::4] = -100
    exact = requiring(in_double(given), names)
    expected = reference(exact, reduction, weighted=weighted)
    found = chunked_cross_entropy(
        given["hidden"], given["weight"], given["target"], bias=given["bias"], reduction=reduction, chunk_tokens=8,
        class_weight=given["class_weight"] if weighted else None, backend="torch",
    )  # fmt: skip
    assert [options.batch_chunk_size for options in calls] == [8]
    assert deviation(found.detach(), expected.detach()) < TOLERANCE
    for ours, theirs in zip(gradients(found, given, names), gradients(expected, exact, names)):
        assert deviation(ours, theirs) < TOLERANCE


@needs_torch_operator
@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 3.0}, {"scale": 2.0}, {"reduction": "none"}, {"dtype": 1}],
    ids=str,
)
def test_what_the_operator_of_torch_gets_wrong_or_cannot_do_runs_on_ours(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *a, **k: pytest.fail("it was called"))
    dtype = torch.bfloat16 if settings.pop("dtype", None) else torch.float32
    given = case(dtype=dtype)
    found = chunked_cross_entropy(given["hidden"], given["weight"], given["target"], backend="torch", **settings)
    native = chunked_cross_entropy(given["hidden"], given["weight"], given["target"], backend="native", **settings)
    assert torch.equal(found, native)


def _fake_liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module with the signature of Liger's function, which runs plain operations and keeps its arguments."""
    calls: list[dict[str, Any]] = []

    def liger_fused_linear_cross_entropy(
        input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
        ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
        softcap: float | None = None, return_z_loss: bool = False,
    ) -> Tensor:  # fmt: skip
        calls.append(dict(locals()))
        z = F.linear(input, weight, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return F.cross_entropy(z, target, ce_weight, reduction=reduction, label_smoothing=label_smoothing)

    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    return calls


def test_liger_gets_the_arguments_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memsave.transforms._deferred_backends import liger_loss

    calls = _fake_liger(monkeypatch)
    given = case()
    task = CrossEntropy(given["target"], smoothing=0.1, class_weight=given["class_weight"], z_loss=0.2)
    head = LinearHead(given["weight"], given["bias"], V)
    steps = (Scale(5.0, inverse=True), Tanh(), Scale(5.0))
    liger_loss(head, task, given["hidden"], steps, "sum", torch.float32)
    (call,) = calls
    assert {k: call[k] for k in ("lse_square_scale", "label_smoothing", "reduction", "softcap")} == {
        "lse_square_scale": 0.2, "label_smoothing": 0.1, "reduction": "sum", "softcap": 5.0,
    }  # fmt: skip
    assert call["ce_weight"] is given["class_weight"]
    assert torch.equal(call["input"], given["hidden"])


def test_auto_takes_liger_on_cuda_where_it_can_and_ours_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memsave.transforms import _deferred_backends as backends

    monkeypatch.setattr(backends, "is_available", lambda name: True)
    given = case()
    head, task = LinearHead(given["weight"], None, V), CrossEntropy(given["target"])
    packed = LinearHead(None, None, V, lambda dtype: given["weight"])
    cuda, cpu = (Products(torch.bfloat16, torch.device(kind)) for kind in ("cuda", "cpu"))

    def chosen(head: Any, steps: Any, reduction: str, products: Products, backend: str = "auto") -> str:
        return backends.choose_backend(backend, head, task, steps, reduction, products)[0]

    assert chosen(head, (), "mean", cuda) == "liger"
    assert chosen(head, (), "mean", cpu) == "native"
    assert chosen(head, (), "none", cuda) == "native"
    assert chosen(head, (Scale(2.0),), "mean", cuda) == "native"
    assert chosen(head, (Scale(2.0, inverse=True), Tanh(), Scale(2.0)), "mean", cuda) == "liger"
    assert chosen(head, (Scale(2.0, inverse=True), Tanh(), Scale(3.0)), "mean", cuda) == "native"
    assert chosen(packed, (), "mean", cuda) == "native"
    assert chosen(head, (), "mean", cuda, "native") == "native"
    assert backends.choose_backend("liger", head, task, (), "mean", cpu) == ("native", "its kernels need CUDA")


def test_every_wrong_argument_is_listed() -> None:
    given = case()
    with pytest.raises(ConfigurationError) as error:
        chunked_cross_entropy(
            given["hidden"], given["weight"], given["target"][:3], reduction="max", label_smoothing=2.0, softcap=-1.0,
            chunk_tokens=0, backend="cuda",
        )  # fmt: skip
    for part in (
        "target of shape (3,)",
        "reduction='max'",
        "label_smoothing=2.0",
        "softcap=-1.0",
        "chunk_tokens=0",
        "'cuda'",
    ):
        assert part in str(error.value)


def test_a_backend_that_is_not_installed_says_what_to_install() -> None:
    given = case()
    with pytest.raises(ConfigurationError, match=r'pip install "lightning-memsave\[liger\]"'):
        chunked_cross_entropy(given["hidden"], given["weight"], given["target"], backend="liger")
