"""PeakMemory: the process's or the device's peak, over all ranks."""

from __future__ import annotations

import pickle

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer

from lightning_memsave import PeakMemory
from lightning_memsave.memory import host, peak_metric

SIZE = 64 * 2**20


def test_it_reads_the_peak_of_the_process():
    metric = PeakMemory()
    metric.update()
    assert float(metric.compute()) == pytest.approx(host.host_peak_bytes(), rel=0.05)
    assert metric.compute().dtype == torch.float64


def test_a_reset_starts_again():
    held = torch.ones(2 * SIZE // 4)
    metric = PeakMemory()
    metric.update()
    high = float(metric.compute())
    assert held.numel() > 0
    del held
    if not host.reset_host_peak():
        pytest.skip("the kernel refuses /proc/self/clear_refs")
    metric.reset()
    metric.update()
    assert high - float(metric.compute()) > SIZE


def test_bytes_are_exact_above_what_float32_holds(monkeypatch):
    monkeypatch.setattr(peak_metric, "host_peak_bytes", lambda: 2**40 + 1)
    metric = PeakMemory()
    metric.update()
    assert int(metric.compute()) == 2**40 + 1


def test_it_is_pickled_and_named_nowhere_in_the_state():
    metric = pickle.loads(pickle.dumps(PeakMemory()))
    metric.update()
    assert float(metric.compute()) > 0
    assert dict(metric.state_dict()) == {}


class Logged(LitLM):
    def __init__(self):
        super().__init__()
        self.peak_memory = PeakMemory()

    def training_step(self, batch, batch_idx):
        self.peak_memory.update()
        self.log("peak_memory", self.peak_memory, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_it_is_logged_by_a_module():
    trainer = make_trainer()
    trainer.fit(Logged(), make_loader())
    assert float(trainer.callback_metrics["peak_memory"]) > 10 * 2**20


def _rank_peak(rank):
    peak_metric.host_peak_bytes = lambda: 1000 * (rank + 1)
    trainer = make_trainer(devices=2, strategy="ddp")
    trainer.fit(Logged(), make_loader())
    return float(trainer.callback_metrics["peak_memory"])


def test_ranks_report_the_highest(ranks):
    assert ranks(_rank_peak) == [2000.0, 2000.0]
