"""A device boundary inside of host memory: copies, counts, and can be told apart from the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim import _offload_boundary
from lightning_memsave.optim._offload_boundary import Boundary, Pairs, Ticket


class FakeBoundary(Boundary):
    """Treats tensors of the module as a device: everything that passes is copied and counted."""

    def __init__(self) -> None:
        self.down = self.up = self.buffers = 0

    def holds(self, device: torch.device) -> bool:
        return True

    def buffer(self, num_bytes: int) -> Tensor:
        self.buffers += num_bytes
        return super().buffer(num_bytes)

    def download(self, pairs: Pairs) -> Ticket:
        self._check(pairs)
        self.down += sum(source.nbytes for source, _ in pairs)
        return super().download(pairs)

    def upload(self, pairs: Pairs) -> Ticket:
        self._check(pairs)
        self.up += sum(source.nbytes for source, _ in pairs)
        return super().upload(pairs)

    @staticmethod
    def _check(pairs: Pairs) -> None:
        for source, target in pairs:
            assert source.untyped_storage()._cdata != target.untyped_storage()._cdata
            assert source.dtype == target.dtype, "a copy that casts would make a temporary on the device"
            assert source.stride() == target.stride(), "a copy that transposes would make a temporary on the device"


def fake_device(monkeypatch: Any) -> FakeBoundary:
    """Let every run of this test see its parameters on a device."""
    boundary = FakeBoundary()
    monkeypatch.setattr(_offload_boundary, "boundary_of", lambda device: boundary)
    return boundary
