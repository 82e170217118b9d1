"""The tracker against CUDA's own counters."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyLM
from torch.utils.checkpoint import checkpoint

from lightning_memsave.memory.recorder import StepRecorder
from lightning_memsave.memory.snapshot import record_snapshot
from lightning_memsave.memory.tracker import track_memory

pytestmark = pytest.mark.gpu

# Kernels ask for workspaces that no operation returns (cuBLAS: 8 or 32 MiB once, reductions, attention's backward).
# The warm-up step below allocates cuBLAS's; the rest stays below this share of the peak at these sizes.
TOLERANCE = 0.03


def make(variant):
    torch.manual_seed(0)
    model = TinyLM(vocabulary=4096, width=512, depth=4).cuda()
    if variant == "checkpoint":
        for block in model.blocks:
            inner = block.forward
            block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=variant == "fused")
    ids = torch.randint(0, 4096, (8, 256), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=variant == "autocast"):
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, ids, step


@pytest.mark.parametrize("variant", ["plain", "fused", "autocast", "checkpoint"])
def test_the_peak_is_the_one_cuda_counts(variant):
    model, optimizer, ids, step = make(variant)
    step()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    with track_memory(model, optimizers=[optimizer], inputs=ids) as tracker:
        known = sum(nbytes for block, nbytes in tracker.log.initial if block.device == "cuda")
        tracker.log.untracked_bytes = max(0, before - known)
        step()
    torch.cuda.synchronize()
    truth = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    found = tracker.measurement()
    assert found.device == "cuda"
    assert found.peak_bytes == pytest.approx(truth, rel=TOLERANCE)
    assert sum(found.by_category.values()) == found.peak_bytes


def test_recomputation_on_the_engine_s_thread_keeps_its_modules():
    model, optimizer, ids, step = make("checkpoint")
    step()
    with track_memory(model, optimizers=[optimizer], inputs=ids) as tracker:
        step()
    born = {
        (b.module, b.settle(tracker.log.marks)) for b, change, phase in tracker.log.events if change > 0 and phase == 1
    }
    assert {(f"blocks.{i}.up", "activations") for i in range(4)} <= born


def test_a_recorder_counts_what_the_device_held_before():
    held = torch.zeros(25 * 2**18, device="cuda")  # 25 MiB that belongs to nobody we know
    model, optimizer, ids, step = make("plain")
    step()
    recorder = StepRecorder([1])
    recorder.begin_step(model, [optimizer], ids)
    step()
    measurement = recorder.end_step(last_of_step=True)
    assert measurement.by_module["(untracked)"]["other"] >= held.numel() * 4
    assert recorder.report().reserved_bytes >= measurement.peak_bytes


def test_a_snapshot_is_written(tmp_path):
    path = tmp_path / "deep" / "snapshot.pickle"
    with record_snapshot(path):
        torch.zeros(2**20, device="cuda")
    assert path.stat().st_size > 100
