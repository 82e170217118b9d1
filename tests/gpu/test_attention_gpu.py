"""Attention kernels on a CUDA device: which one runs, why another one cannot, peaks, and recomputes in its threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from lightning_memsave import ActivationCheckpointing, AttentionKernel
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._attention_kernels import SDPACall, kernel_of, why_not
from lightning_memsave.transforms._attention_mode import AttentionMode

pytestmark = pytest.mark.gpu

# Kernels in bf16 under autocast; atomic additions in backward come in any order.
TOLERANCE = 2e-2
HALF = {"accelerator": "gpu", "precision": "bf16-mixed"}


def tensors(heads: int = 4, kv: int = 4, tokens: int = 256, dim: int = 64, dtype: Any = torch.bfloat16) -> list[Tensor]:
    shapes = [(2, heads, tokens, dim), (2, kv, tokens, dim), (2, kv, tokens, dim)]
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]


class Masked(LitLM):
    """Attention with a causal mask and repeated heads, as much code calls it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            q, k, v = (p(x).view(batch, tokens, -1, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
            k, v = (t[:, :, None].expand(batch, 2, 2, tokens, 16).reshape(batch, 4, tokens, 16) for t in (k, v))
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            return x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def _build(self) -> None:
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Masked.Block() for _ in range(2))

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embedding(batch)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch.flatten())


def fit(module: Any, *callbacks: Any, **options: Any) -> Any:
    trainer = make_trainer(callbacks=list(callbacks), **{**HALF, **options})
    trainer.fit(module, make_loader(num_tokens=128))
    return module


def test_torch_says_why_a_kernel_cannot_run(cuda) -> None:
    q, k, v = tensors()
    assert kernel_of(SDPACall(q, k, v, causal=True)) in ("flash", "cuDNN")
    assert why_not(SDPACall(q, k, v, causal=True), SDPBackend.FLASH_ATTENTION) == ""
    mask = torch.ones(256, 256, dtype=torch.bool, device=cuda).tril()
    assert "mask" in why_not(SDPACall(q, k, v, mask), SDPBackend.FLASH_ATTENTION).lower()
    wide = SDPACall(*tensors(dtype=torch.float32), causal=True)
    assert "Half" in why_not(wide, SDPBackend.FLASH_ATTENTION)
    assert "256" in why_not(SDPACall(*tensors(dim=512)), SDPBackend.FLASH_ATTENTION)


@pytest.mark.parametrize("implementation", ["auto", "flash_attention", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"])
@pytest.mark.parametrize("others", [[], [ActivationCheckpointing(["Block"])]], ids=["alone", "checkpointing"])
def test_losses_are_those_of_the_math_kernel(cuda, implementation, others) -> None:
    math = fit(Masked(), AttentionKernel("math"))
    found = fit(Masked(), AttentionKernel(implementation), *others)
    assert found.losses == pytest.approx(math.losses, abs=TOLERANCE)


def test_a_kernel_that_cannot_run_ends_the_run_by_layer_and_reason(cuda) -> None:
    with pytest.raises(ConfigurationError, match=r"'sdpa_flash' cannot run Block \(blocks.0\): .*(Half|dtype)"):
        fit(Masked(), AttentionKernel("sdpa_flash"), precision="32-true")


def test_a_causal_mask_and_repeated_heads_cost_nothing(cuda) -> None:
    tokens = 4096

    def peak(mode: AttentionMode | None) -> int:
        q, k, v = tensors(heads=8, kv=2, tokens=tokens)
        mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool, device=cuda).tril()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            key, value = (t[:, :, None].expand(2, 2, 4, tokens, 64).reshape(2, 8, tokens, 64) for t in (k, v))
            F.scaled_dot_product_attention(q, key, value, mask).sum().backward()

        if mode is None:
            with torch.nn.attention.sdpa_kernel([SDPBackend.MATH]):
                step()
        else:
            with mode:
                step()
        assert [t.grad is not None for t in (q, k, v)] == [True] * 3
        return torch.cuda.max_memory_allocated() - before

    mode = AttentionMode("auto", {})
    scores = 2 * 8 * tokens * tokens * 2
    assert peak(None) > scores
    assert peak(mode) < scores / 4
    assert {kernel for kernel, *_ in mode.kernels} <= {"flash", "cuDNN"}


def test_a_recompute_in_the_devices_thread_makes_the_calls_of_the_forward(cuda) -> None:
    q, k, v = tensors()
    mask = torch.ones(256, 256, dtype=torch.bool, device=cuda).tril()
    mode = AttentionMode("auto", {})
    with mode:
        out = torch.utils.checkpoint.checkpoint(F.scaled_dot_product_attention, q, k, v, mask, use_reentrant=False)
        out.float().square().sum().backward()
    assert mode.rewrites == {"causal masks replaced by is_causal=True": 2}
