"""Device memory that waits on the host while nothing uses it, bit for bit and at the same storages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory._reach import storages, tensors_in
from lightning_memsave.optim._offload_boundary import Boundary
from lightning_memsave.units import format_bytes

__all__ = ["Parking", "averaged_models", "storages_of"]


class Parking:
    """Moves storages to the host and back; every tensor on them stays the object it is.

    Args:
        boundary: Between the device and the host.

    """

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._parked: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._free: dict[int, list[Tensor]] = {}  # host memory by its size, used again in the next phase

    @property
    def nbytes(self) -> int:
        """Bytes that are away from the device now."""
        return sum(host.nbytes for _, host in self._parked.values())

    @property
    def host_bytes(self) -> int:
        """Host memory held, in use or not."""
        return self.nbytes + sum(size * len(free) for size, free in self._free.items())

    def park(self, found: Iterable[torch.UntypedStorage], *, budget: int | None = None) -> None:
        """Move storages of the device to the host; those that are parked already or on the host stay.

        Args:
            found: Each may come several times.
            budget: Host memory this may take.

        Raises:
            ConfigurationError: If it takes more; nothing has moved then.

        """
        wanted = {s._cdata: s for s in found if s.nbytes() and self._boundary.holds(s.device)}
        size = self.nbytes + sum(s.nbytes() for key, s in wanted.items() if key not in self._parked)
        if budget is not None and size > budget:
            raise ConfigurationError(
                f"OptimizerOffload: {format_bytes(size)} of host memory is needed for what waits during validation, "
                f"and host_budget allows {format_bytes(budget)}. Raise it, or remove when='evaluation'."
            )
        moving = []
        for storage in wanted.values():
            if storage._cdata not in self._parked:
                free = self._free.get(storage.nbytes())
                host = free.pop() if free else self._boundary.buffer(storage.nbytes())
                self._parked[storage._cdata] = (storage, host)
                moving.append((storage, host))
        self._boundary.download([(_as_bytes(storage), host) for storage, host in moving]).wait()
        for storage, _ in moving:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Move everything back; a second call does nothing."""
        if not self._parked:
            return
        returning = list(self._parked.values())
        for storage, host in returning:
            storage.resize_(host.nbytes)
        self._boundary.upload([(host, _as_bytes(storage)) for storage, host in returning]).wait()
        self._boundary.finish()
        self._parked.clear()
        for _, host in returning:
            self._free.setdefault(host.nbytes, []).append(host)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def storages_of(values: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in a structure; those of wrapper subclasses are inside of them."""
    for tensor in tensors_in(values):
        for storage, _ in storages(tensor):
            yield storage


def averaged_models(holder: Any) -> list[AveragedModel]:
    """Return torch's averaged models among the attributes of an object."""
    return [value for value in vars(holder).values() if isinstance(value, AveragedModel)]
