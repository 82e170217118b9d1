"""OptimizerOffload on a CUDA device: peak and step time beside torchao's, and the numbers of ordinary training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, TinyLM, make_loader, make_trainer
from torch import nn

from lightning_memsave import OptimizerOffload
from lightning_memsave.optim._offload_boundary import CudaBoundary
from lightning_memsave.optim._offload_phases import Parking, storages_of
from lightning_memsave.optim.offload import offload_optimizer

pytestmark = pytest.mark.gpu

# The host's kernels and the device's round differently; atomic additions in backward come in any order.
TOLERANCE = 1e-3
WIDE = {"vocabulary": 64, "width": 256, "depth": 2}


def fit(*callbacks: Any, **options: Any) -> tuple[LitLM, Any]:
    module = LitLM(**WIDE)
    trainer = make_trainer(callbacks=[*callbacks], **{"accelerator": "gpu", "max_epochs": 2, **options})
    trainer.fit(module, make_loader())
    return module, trainer


WAYS: dict[str, dict[str, Any]] = {"host": {}, "gradients": {"gradients": True}, "files": {"device": "state"}}


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_ordinary_training_and_no_state_is_on_the_device(cuda, way, options) -> None:
    plain, _ = fit(**options)
    seen: list[set[str]] = []

    class Where(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({v.device.type for s in trainer.optimizers[0].state.values() for v in s.values()})

    module, _ = fit(OptimizerOffload(**WAYS[way]), Where(), **options)
    assert module.losses == pytest.approx(plain.losses, abs=TOLERANCE)
    assert set().union(*seen) == {"cpu"}


def test_a_resume_puts_no_state_on_the_device(cuda, tmp_path) -> None:
    whole, _ = fit(OptimizerOffload())
    _, trainer = fit(OptimizerOffload(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = LitLM(**WIDE)
    again = make_trainer(callbacks=[OptimizerOffload()], accelerator="gpu", max_epochs=2)
    again.fit(module, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert module.losses == pytest.approx(whole.losses[3:], abs=TOLERANCE)


def test_state_leaves_the_device_in_validation_and_comes_back_bit_for_bit(cuda) -> None:
    state = [torch.randn(2**20, device=cuda) for _ in range(8)]
    copies = [t.cpu() for t in state]
    parking, before = Parking(CudaBoundary(cuda)), torch.cuda.memory_allocated(cuda)
    for _ in range(2):
        parking.park(storages_of(state))
        assert before - torch.cuda.memory_allocated(cuda) == 8 * 2**22
        parking.bring_back()
        assert all(torch.equal(t.cpu(), c) for t, c in zip(state, copies))
    assert torch.cuda.memory_allocated(cuda) == before


def measure(cuda: torch.device, prepare: Callable[[nn.Module], tuple[Any, Callable[[], None]]]) -> tuple[int, float]:
    """Return the requested bytes at the peak and the median seconds of a step of a 200M-parameter bf16 model."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    model = TinyLM(vocabulary=32_000, width=1024, depth=11).to(cuda, torch.bfloat16)
    optimizer, close = prepare(model)
    x = torch.randint(0, 32_000, (8, 256), device=cuda)
    seconds = []
    for step in range(8):
        if step == 3:
            torch.cuda.reset_peak_memory_stats(cuda)
        torch.cuda.synchronize()
        start = time.perf_counter()

        def closure() -> Any:
            loss = model(x).float().square().mean()
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    close()
    return torch.cuda.memory_stats(cuda)["requested_bytes.all.peak"], sorted(seconds[3:])[2]


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_peak_and_step_time_are_not_above_those_of_torchao(cuda, gradients, record_property) -> None:
    torchao = pytest.importorskip("torchao.optim", reason="needs torchao")

    def ours(model: nn.Module) -> tuple[Any, Callable[[], None]]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        offloaded = offload_optimizer(optimizer, boundary=CudaBoundary(cuda), gradients=gradients)
        if offloaded.gradients is not None:
            offloaded.gradients.step_in_backward = True
        return optimizer, offloaded.close

    def theirs(model: nn.Module) -> tuple[Any, Callable[[], None]]:
        optimizer = torchao.CPUOffloadOptimizer(
            model.parameters(), torch.optim.AdamW, offload_gradients=gradients, fused=True, lr=1e-4
        )
        return optimizer, lambda: None

    (peak, seconds), (their_peak, their_seconds) = measure(cuda, ours), measure(cuda, theirs)
    record_property("ours", f"{peak} B, {seconds:.3f} s")
    record_property("torchao", f"{their_peak} B, {their_seconds:.3f} s")
    assert peak <= their_peak * 1.01
    assert seconds <= their_seconds * 1.05
