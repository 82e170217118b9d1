"""What the GPU tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """Give a test the first CUDA device with an empty cache and fresh peaks, and empty the cache after it."""
    device = torch.device("cuda", 0)
    _clean(device)
    yield device
    _clean(device)


def _clean(device: torch.device) -> None:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
