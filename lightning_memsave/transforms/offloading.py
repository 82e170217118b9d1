"""Keep what blocks save for backward outside of the device, and bring it back one block ahead of the backward."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.optim._offload_boundary import boundary_of
from lightning_memsave.transforms._offload_store import ActivationStore, DiskStore, HostStore
from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms._saved_weights import SavedWeights
from lightning_memsave.transforms.blocks import select_blocks
from lightning_memsave.units import format_bytes

__all__ = ["BlockOffloader", "describe_store", "offload_blocks", "offloader_of"]

SUBJECT = "ActivationOffloading"


def offload_blocks(
    root: nn.Module,
    patterns: Sequence[str],
    *,
    device: str | Path,
    host_budget: int | None = None,
    min_bytes: int,
    make_store: Callable[[torch.device], ActivationStore] | None = None,
) -> Applied:
    """Offload what the selected blocks save for backward, in place.

    Args:
        root: The model.
        patterns: ``("auto",)`` for the repeated blocks, or globs and class names.
        device: ``"cpu"`` or a directory.
        host_budget: Bytes that may be held there.
        min_bytes: Smaller storages stay on the device.
        make_store: Makes the store from the device of the first tensor; replaced in tests.

    Returns:
        What was done, with the way back.

    Raises:
        NothingToTransformError: If nothing is selected.

    """
    blocks = select_blocks(root, patterns, subject=SUBJECT)
    offloader = BlockOffloader(make_store or _stores(device, host_budget), min_bytes)
    undo = [patch_forward(block.module, _offloaded_forward, offloader=offloader) for block in blocks]
    undo.append(offloader.close)
    classes = Counter(type(block.module).__name__ for block in blocks)
    what = ", ".join(f"{count} {name}" for name, count in classes.items())
    where = "host memory" if device == "cpu" else str(device)

    def undo_all() -> None:
        while undo:
            undo.pop()()

    return Applied(summary=f"keep what {what} save for backward in {where}", num_modules=len(blocks), undo=undo_all)


def offloader_of(root: nn.Module) -> BlockOffloader | None:
    """Return the offloader of the first offloaded block below ``root``."""
    for module in root.modules():
        patch = module.__dict__.get("forward")
        while isinstance(patch, InstanceForward):
            if patch.call is _offloaded_forward:
                return patch.options["offloader"]  # type: ignore[no-any-return]
            patch = patch.inner
    return None


def _stores(device: str | Path, budget: int | None) -> Callable[[torch.device], ActivationStore]:
    def make(found: torch.device) -> ActivationStore:
        if device != "cpu":
            return DiskStore(device, budget)
        boundary = boundary_of(found)
        if boundary is None:
            raise ConfigurationError(
                f'{SUBJECT}: device="cpu" was asked for, and the module trains on the CPU: its activations are in host '
                "memory already. Write device=<directory> to keep them on disk, or use ActivationCheckpointing."
            )
        return HostStore(boundary, budget)

    return make


def _offloaded_forward(patch: InstanceForward, *args: Any, **kwargs: Any) -> Any:
    offloader: BlockOffloader = patch.options["offloader"]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return patch.inner(*args, **kwargs)
    with offloader.block(patch.module):
        return patch.inner(*args, **kwargs)


class BlockOffloader:
    """Moves storages away when a block saves them, and back when its backward needs them.

    Args:
        make_store: Makes the store from the device of the first tensor.
        min_bytes: Smaller storages stay.

    """

    def __init__(self, make_store: Callable[[torch.device], ActivationStore], min_bytes: int) -> None:
        self._make_store = make_store
        self._min_bytes = min_bytes
        self.store: ActivationStore | None = None
        self._away: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Away]]] = {}
        self._last: weakref.ref[_Group] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockOffloader:
        return BlockOffloader(self._make_store, self._min_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockOffloader, (self._make_store, self._min_bytes)

    @contextmanager
    def block(self, module: nn.Module) -> Iterator[None]:
        """Offload what is saved inside, except the block's own weights and buffers."""
        group = _Group(self._last() if self._last is not None else None)
        weights = SavedWeights(module)
        self._forget()
        with saved_tensors_hooks(lambda tensor: self._pack(tensor, group, weights), _unpack):
            yield
        if group.entries:
            self._last = weakref.ref(group)

    def close(self) -> None:
        """Free the buffers that no graph holds."""
        if self.store is not None:
            self.store.close()

    def _forget(self) -> None:
        self._away = {
            key: (storage, away)
            for key, (storage, away) in self._away.items()
            if _alive(storage) and away() is not None
        }

    def _pack(self, tensor: Tensor, group: _Group, weights: SavedWeights) -> Any:
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._min_bytes or weights.hold(tensor):
            return tensor
        key = (storage._cdata, tensor._version)
        _, found = self._away.get(key, (None, None))
        away = found() if found is not None else None
        if away is None:
            away = self._put(storage, tensor.device, group)
            if away is None:
                return tensor
            self._away[key] = (StorageWeakRef(storage), weakref.ref(away))  # type: ignore[no-untyped-call]
        away.uses += 1
        return _Saved(away, tensor)

    def _put(self, storage: torch.UntypedStorage, device: torch.device, group: _Group) -> _Away | None:
        if self.store is None:
            self.store = self._make_store(device)
        with torch.no_grad():
            data = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            buffer = self.store.put(data)
        return None if buffer is None else _Away(self.store, buffer, data.nbytes, device, group)


def _alive(storage: StorageWeakRef) -> bool:
    return not storage.expired()  # type: ignore[no-untyped-call]


class _Group:
    """What one forward of a block put away; its backward asks for all of it at once."""

    def __init__(self, previous: _Group | None) -> None:
        self.entries: list[weakref.ref[_Away]] = []
        self._previous = weakref.ref(previous) if previous is not None else None

    def fetch(self) -> None:
        """Begin to bring everything back."""
        for entry in self.entries:
            away = entry()
            if away is not None:
                away.fetch()

    def fetch_previous(self) -> None:
        """Begin to bring back what the block before this one needs."""
        previous = self._previous() if self._previous is not None else None
        if previous is not None:
            previous.fetch()


class _Away:
    """One storage that is not on the device."""

    def __init__(self, store: ActivationStore, buffer: Any, nbytes: int, device: torch.device, group: _Group) -> None:
        self._store, self._buffer, self._nbytes, self._device, self._group = store, buffer, nbytes, device, group
        self._fetched: Any = None
        self._data: Tensor | None = None
        self.uses = 0  # tensors that were saved from it
        self._taken = 0
        group.entries.append(weakref.ref(self))

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._data is None and self._fetched is None:
            self._fetched = self._store.fetch(self._buffer, self._nbytes, self._device)

    def take(self) -> Tensor:
        """Return the bytes on the device; the last tensor that was saved from it gives them up."""
        if self._data is None:
            self._group.fetch()
            self._data, self._fetched = self._store.take(self._fetched), None
            self._group.fetch_previous()
        data = self._data
        self._taken += 1
        if self._taken >= self.uses:
            self._data, self._taken = None, 0  # a second backward over a retained graph fetches it again
        return data

    def __del__(self) -> None:
        self._store.release(self._buffer, self._nbytes)


class _Saved:
    """What autograd keeps instead of a tensor."""

    def __init__(self, away: _Away, tensor: Tensor) -> None:
        self._away, self._dtype = away, tensor.dtype
        self._place = (tensor.storage_offset(), tensor.size(), tensor.stride())

    def tensor(self) -> Tensor:
        """Return the tensor on the device."""
        storage = self._away.take().untyped_storage()
        empty = torch.empty(0, dtype=self._dtype, device=storage.device)
        return empty.set_(storage, *self._place)


def _unpack(saved: Any) -> Tensor:
    return saved.tensor() if isinstance(saved, _Saved) else saved


def describe_store(store: ActivationStore) -> str:
    """Return one line about what was put away."""
    line = f"{store.stored} tensors, {format_bytes(store.peak_bytes)} at a time"
    if store.refused and store.budget is not None:
        line += f"; {store.refused} stayed on the device, beyond host_budget={format_bytes(store.budget)}"
    return line
