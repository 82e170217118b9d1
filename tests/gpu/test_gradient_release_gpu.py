"""GradientRelease on a CUDA device: what is held is pinned, nothing waits for a copy, and the peak falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LitLM, TinyLM, make_loader, make_trainer
from torch import Tensor, nn

from lightning_memsave import ActivationCheckpointing, GradientRelease, LowMemoryOptimizer
from lightning_memsave.optim.release import Clipping, GradientReleaser

pytestmark = pytest.mark.gpu

# Atomic additions in CUDA's attention and embedding backward come in any order.
TOLERANCE = 1e-3


def losses(*callbacks: Any, **options: Any) -> list[float]:
    module = LitLM(width=256, dropout=0.1)
    torch.manual_seed(1)
    make_trainer(callbacks=list(callbacks), accelerator="gpu", max_epochs=3, **options).fit(module, make_loader())
    return module.losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", [None, "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_a_run_is_the_plain_one(cuda, precision, name, accumulate) -> None:
    options = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    swap = [LowMemoryOptimizer(name)] if name else []
    found = losses(*swap, GradientRelease(clip="two_pass", accumulate=accumulate), **options)
    assert found == pytest.approx(losses(*swap, **options), abs=TOLERANCE if precision == "32-true" else 5e-2)


def test_two_passes_over_recomputed_blocks(cuda) -> None:
    found = losses(ActivationCheckpointing("Block"), GradientRelease(clip="two_pass"), gradient_clip_val=0.05)
    assert found == pytest.approx(losses(gradient_clip_val=0.05), abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_linear_layers_are_bit_equal(cuda, kind) -> None:
    # no attention and no embedding: every kernel is deterministic
    def run(released: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(4))).cuda()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **{kind: True})
        release = GradientReleaser(optimizer, accumulate="host") if released else None
        clip = Clipping(limit=0.1, kind="two_pass")
        batches = torch.randn(6, 64, 512, device="cuda")
        for number, batch in enumerate(batches):
            loss = (net(batch) ** 2).mean()
            last = number % 3 == 2
            if release is not None:
                release.backward(loss, last=last, clip=clip)
            else:
                loss.backward()
                if last:
                    nn.utils.clip_grad_norm_(net.parameters(), clip.limit)
            if last:
                optimizer.step()
                optimizer.zero_grad()
        if release is not None:
            assert all(buffer.is_pinned() for buffer in release._held._buffers.values())
            release.close()
        return [p.detach().clone() for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False)))


def test_the_peak_is_that_of_a_backward_that_keeps_no_gradient(cuda) -> None:
    def peak(mode: str) -> int:
        net = TinyLM(width=512, depth=6, tied=True).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
        release = GradientReleaser(optimizer) if mode == "released" else None
        if mode == "dropped":
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = torch.randint(0, 64, (2, 9), device="cuda")
        for _ in range(2):
            loss = nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward() if release is None else release.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        loss = nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward() if release is None else release.backward(loss)
        if release is not None:
            release.close()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"]

    net = TinyLM(width=512, depth=6, tied=True)
    largest = max(p.nbytes for p in net.parameters())
    whole = sum(p.nbytes for p in net.parameters())
    assert abs(peak("released") - peak("dropped")) <= largest
    assert peak("plain") - peak("released") > 0.7 * whole
