"""Allocator snapshots need CUDA and say so."""

from __future__ import annotations

import pytest
import torch

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory import snapshot

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")


@without_cuda
def test_a_snapshot_without_cuda_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no CUDA device"), snapshot.record_snapshot(tmp_path / "x.pickle"):
        pass
    assert not (tmp_path / "x.pickle").exists()


@without_cuda
def test_the_message_says_what_to_write_instead():
    with pytest.raises(ConfigurationError, match="Leave snapshot=False"):
        snapshot.require_cuda("MemoryProfiler(snapshot=True)")


@without_cuda
def test_counters_are_none_without_cuda():
    assert snapshot.requested_bytes() is None
    assert snapshot.reserved_peak_bytes() is None
    assert not torch.cuda.is_initialized()
