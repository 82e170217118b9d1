"""ChunkedLoss on a CUDA device: values, peak bytes, time, Liger's kernels, loss scaling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from torch import Tensor

from lightning_memsave import ChunkedLoss, chunked_cross_entropy
from lightning_memsave._imports import is_available
from lightning_memsave.transforms.deferred_logits import defer_counts, defer_logits

pytestmark = pytest.mark.gpu

# Products in another order; TF32 is off in tests.
FP32, BF16 = 1e-5, 2e-2
BACKENDS = [
    "native",
    pytest.param("liger", marks=pytest.mark.skipif(not is_available("liger_kernel"), reason="no Liger")),
]


def problem(
    device: torch.device, dtype: torch.dtype, rows: int, classes: int, width: int, trained: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, device=device, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(classes, width, device=device, dtype=dtype, generator=generator).mul_(0.05)
    target = torch.randint(0, classes, (rows,), device=device, generator=generator)
    target[::7] = -100
    return hidden, weight.requires_grad_(trained), target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_losses_and_gradients_are_the_plain_ones(
    cuda: torch.device, backend: Any, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, target = problem(cuda, dtype, 300, 5000, 128)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(F.linear(*exact), target)
    found = chunked_cross_entropy(hidden, weight, target, backend=backend, chunk_tokens=64)
    assert float((found - expected).abs()) < (1e-5 if dtype == torch.float32 else 1e-2) * float(expected)
    for ours, theirs in zip(torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(expected, exact)):
        assert float((ours - theirs).abs().max()) < tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("trained", [False, True])
def test_the_peak_is_a_chunk_and_the_gradients(cuda: torch.device, trained: bool) -> None:
    rows, classes, width, chunk = 4096, 64_000, 512, 512
    hidden, weight, target = problem(cuda, torch.bfloat16, rows, classes, width, trained)
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_stats(cuda)["requested_bytes.all.current"]
    chunked_cross_entropy(hidden, weight, target, chunk_tokens=chunk, backend="native").backward()
    peak = torch.cuda.memory_stats(cuda)["requested_bytes.all.peak"] - before
    logits, head = chunk * classes * 6, trained * classes * width * 6
    assert peak < logits + head + 4 * rows * width * 2 + (64 << 20)
    assert peak < rows * classes * 4


def test_a_head_of_248320_classes_trains_in_the_bytes_of_its_gradient(cuda: torch.device) -> None:
    rows, classes, width = 16_384, 248_320, 2048
    hidden, weight, target = problem(cuda, torch.bfloat16, rows, classes, width)
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_stats(cuda)["requested_bytes.all.current"]
    chunked_cross_entropy(hidden, weight, target, backend="native").backward()
    peak = torch.cuda.memory_stats(cuda)["requested_bytes.all.peak"] - before
    # fp32 sum and the bf16 gradient made of it, and the gradient of the hidden states
    assert peak < 1.05 * (classes * width * 6 + 2 * rows * width * 2)


def test_the_time_stays_near_the_plain_loss(cuda: torch.device) -> None:
    hidden, weight, target = problem(cuda, torch.bfloat16, 8192, 128_256, 2048)

    def seconds(loss: Callable[[], Tensor]) -> float:
        best = float("inf")
        for _ in range(4):
            hidden.grad = weight.grad = None
            torch.cuda.synchronize(cuda)
            start = time.perf_counter()
            loss().backward()
            torch.cuda.synchronize(cuda)
            best = min(best, time.perf_counter() - start)
        return best

    plain = seconds(lambda: F.cross_entropy(F.linear(hidden, weight).float(), target))
    assert seconds(lambda: chunked_cross_entropy(hidden, weight, target, backend="native")) < 2 * plain


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_trainer_trains_as_without_it(precision: str) -> None:
    def train(callbacks: list[Any]) -> list[float]:
        torch.manual_seed(1)
        module = LitLM(vocabulary=512)
        settings = {"accelerator": "gpu", "precision": precision, "callbacks": callbacks}
        make_trainer(**settings).fit(module, make_loader(vocabulary=512))
        return module.losses

    found, expected = train([ChunkedLoss(chunk_tokens=32)]), train([])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-2, atol=1e-2)


def test_argmax_and_topk_run_on_the_device(cuda: torch.device) -> None:
    module = LitLM().to(cuda)
    ids = torch.randint(0, 64, (2, 9), device=cuda)
    plain = module.net(ids).detach()
    defer_logits(module)
    logits = module.net(ids)
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    assert torch.equal(logits.topk(3, -1).indices, plain.topk(3, -1).indices)
    assert logits.is_cuda
    (counts,) = defer_counts(module).values()
    assert not counts.materialised
