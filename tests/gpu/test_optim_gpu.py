"""Optimizers, gradients and the caching allocator on a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer

from lightning_memsave import ConfigurationError, EarlyZeroGrad, LowMemoryOptimizer
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.state_bytes import held_state_bytes
from lightning_memsave.optim.swap import parameters_kept_32bit

pytestmark = pytest.mark.gpu

# Atomic additions in CUDA's attention and embedding backward come in any order.
TOLERANCE = 1e-3
OWN = [name for name, row in OPTIMIZERS.items() if row.library == "lightning_memsave" and row.master == "0"]
WIDE = {"vocabulary": 64, "width": 256, "depth": 2}  # has tensors above and below 1e5 values


def fit(module: Any, *callbacks: Any, ckpt_path: str | None = None, **options: Any) -> Any:
    trainer = make_trainer(callbacks=[*callbacks], **{"accelerator": "gpu", **options})
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return trainer


def expected_bytes(module: Any, name: str) -> int:
    row = OPTIMIZERS[name]
    kept = parameters_kept_32bit(module, "auto", heads=row.matrices_only)
    return row.shared_bytes + sum(row.state_bytes(p, id(p) in kept, {}) for p in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw_split_master"])  # test_precision_gpu.py
def test_every_optimizer_trains_and_holds_what_it_says(cuda, name, precision) -> None:
    module = LitLM(**WIDE, lr=1e-2 if name == "adalomo" else 1e-3)
    trainer = fit(module, LowMemoryOptimizer(name), EarlyZeroGrad(), precision=precision, max_epochs=4)
    assert module.losses[-1] < module.losses[0]
    assert held_state_bytes(trainer.optimizers[0]) == expected_bytes(module, name)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_large_tensors_are_paged_before_and_after_a_resume(cuda, name, tmp_path) -> None:
    whole = LitLM(**WIDE)
    fit(whole, LowMemoryOptimizer(name), max_epochs=2)
    path = str(tmp_path / "epoch.ckpt")
    fit(LitLM(**WIDE), LowMemoryOptimizer(name)).save_checkpoint(path)
    torch.load(path, weights_only=True)
    resumed = LitLM(**WIDE)
    trainer = fit(resumed, LowMemoryOptimizer(name), max_epochs=2, ckpt_path=path)
    paged = {p.numel(): getattr(s["state1"], "is_paged", False) for p, s in trainer.optimizers[0].state.items()}
    assert paged == {size: size >= 100_000 for size in paged}
    assert resumed.losses == pytest.approx(whole.losses[3:], abs=TOLERANCE)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "lion", *OWN])
def test_resume_at_an_epoch_boundary_continues_the_run(cuda, name, tmp_path) -> None:
    whole = LitLM(**WIDE)
    fit(whole, LowMemoryOptimizer(name), max_epochs=2)
    path = str(tmp_path / "epoch.ckpt")
    fit(LitLM(**WIDE), LowMemoryOptimizer(name)).save_checkpoint(path)
    resumed = LitLM(**WIDE)
    fit(resumed, LowMemoryOptimizer(name), max_epochs=2, ckpt_path=path)
    assert resumed.losses == pytest.approx(whole.losses[3:], abs=TOLERANCE)


@pytest.mark.parametrize("name", OWN)
def test_our_own_optimizers_step_as_on_the_cpu(cuda, name) -> None:
    options = {"rank": 16} if "rank" in OPTIMIZERS[name].options else {}
    made = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(300, 200, generator=generator).to(device))
        optimizer = OPTIMIZERS[name].build([{"params": [weight], "lr": 1e-3}], options, ())
        for _ in range(5):
            weight.grad = torch.randn(300, 200, generator=generator).to(device)
            optimizer.step()
        made[device] = weight.detach().cpu()
    if name == "apollo_adamw":  # its projections are drawn on the device
        assert made["cuda"].isfinite().all()
    else:
        # moments on the border of two codes, Muon's products in bf16 on the GPU
        torch.testing.assert_close(made["cuda"], made["cpu"], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", [n for n in OWN if n not in ("muon", "galore_adamw", "apollo_adamw")])
def test_a_step_makes_no_copy_of_a_large_matrix(cuda, name) -> None:
    weight = torch.nn.Parameter(torch.randn(2**13, 2**13, device="cuda"))  # 16 blocks, 256 MiB
    optimizer = OPTIMIZERS[name].build([{"params": [weight], "lr": 1e-3}], {}, ())
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        optimizer.step()
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before <= 10 * 4 * 2**22


class Peak(pl.Callback):
    """The requested bytes at the peak of the last step's forward and backward, before the optimizer steps."""

    def on_train_batch_start(self, *_: Any) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]


def test_gradients_freed_early_lower_the_peak(cuda) -> None:
    results = {}
    for savers in ((), (EarlyZeroGrad(),)):
        module, peak = LitLM(vocabulary=64, width=512, depth=4), Peak()
        fit(module, *savers, peak, max_steps=3)
        results[len(savers)] = (module.losses, peak.peak)
    gradients = sum(p.nbytes for p in module.parameters())
    assert results[1][0] == pytest.approx(results[0][0], abs=TOLERANCE)
    # the activations of 8 x 16 tokens are smaller than the gradients, and hide that much of the saving
    assert 0 < results[0][1] - results[1][1] <= gradients


def test_fp16_trainables_and_fused_clipping_stop_at_setup(cuda) -> None:
    half = LitLM()
    half.net.blocks.half()
    with pytest.raises(ConfigurationError, match="trainable parameters are fp16"):
        fit(half, EarlyZeroGrad(), precision="16-mixed")

    class Fused(LitLM):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), fused=True)

    with pytest.raises(ConfigurationError, match="fused=False"):
        fit(Fused(), EarlyZeroGrad(), precision="16-mixed", gradient_clip_val=1.0)


SCRIPT = """
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning_memsave import AllocatorSettings
late = torch.zeros(2**20, device="cuda") if {late} else None
trainer = make_trainer(accelerator="gpu", callbacks=[AllocatorSettings()])
class Spy(__import__("lightning").pytorch.Callback):
    def on_train_end(self, trainer, module):
        segments = torch.cuda.memory_snapshot()
        print("SEGMENTS", sum(s["is_expandable"] for s in segments), len(segments))
trainer.callbacks.append(Spy())
trainer.fit(LitLM(), make_loader())
"""


@pytest.mark.parametrize("late", [False, True])
def test_segments_are_expandable_from_the_first_allocation_or_it_says_so(cuda, late) -> None:
    # in a process of its own: the allocator must not have reserved anything
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(late=late)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    [expandable, total] = map(int, out.stdout.split("SEGMENTS")[1].split()[:2])
    assert expandable >= 1
    assert (total - expandable > 0) is late
    assert ("too late for" in out.stderr) is late
