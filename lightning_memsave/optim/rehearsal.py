"""Find out whether what was saved comes back the same: tensors bit by bit, and an optimizer through its own loader."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.memory._reach import storages

__all__ = ["differences", "fingerprints", "load_differences", "loads_by_class", "tensor_bytes", "unsavable"]

_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)


def tensor_bytes(tree: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples; shared memory counts once.

    Example:
        >>> tensor_bytes({"a": torch.zeros(2), "b": [torch.zeros(3, dtype=torch.int8)]})
        11

    """
    return sum({s.data_ptr(): t.numel() * t.itemsize for x in _tensors(tree) for s, t in storages(x)}.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def differences(saved: Any, found: Any, *, place: str = "", names: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield what differs between two nested dicts, lists and tuples, one line each.

    Tensors are compared bit by bit, one at a time and in host memory; objects of other classes are not compared.

    Args:
        saved: What should be there.
        found: What is there.
        place: Where in a larger tree this is.
        names: What to call a place beside its own words.

    Example:
        >>> list(differences({"w": torch.zeros(2), "step": 3}, {"w": torch.zeros(3), "step": 3}))
        ['w was float32 [2] and is float32 [3]']

    """
    if isinstance(saved, Tensor) or isinstance(found, Tensor):
        if not isinstance(saved, Tensor) or not isinstance(found, Tensor) or _kind(saved) != _kind(found):
            yield f"{_call(place, names)} was {_kind(saved)} and is {_kind(found)}"
        elif not _same_bits(saved, found):
            yield f"{_call(place, names)} has other values"
    elif isinstance(saved, Mapping) and isinstance(found, Mapping):
        for key in [*saved, *(key for key in found if key not in saved)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in found or key not in saved:
                yield f"{_call(inner, names)} {'is missing' if key in saved else 'was not there'}"
            else:
                yield from differences(saved[key], found[key], place=inner, names=names)
    elif isinstance(saved, (list, tuple)) and isinstance(found, (list, tuple)):
        if len(saved) != len(found):
            yield f"{_call(place, names)} had {len(saved)} entries and has {len(found)}"
            return
        for number, (first, second) in enumerate(zip(saved, found)):
            yield from differences(first, second, place=f"{place}[{number}]", names=names)
    elif isinstance(saved, _PLAIN) and saved != found and not (saved != saved and found != found):
        yield f"{_call(place, names)} was {saved!r} and is {found!r}"


def _call(place: str, names: Mapping[str, str] | None) -> str:
    for prefix, name in (names or {}).items():
        if place == prefix or place.startswith(f"{prefix}."):
            return f"{place} ({name})"
    return place


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _same_bits(first: Tensor, second: Tensor) -> bool:
    ours, theirs = [t for _, t in storages(first.detach())], [t for _, t in storages(second.detach())]
    return len(ours) == len(theirs) and all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(ours, theirs))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


class _Nowhere(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def unsavable(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the entries of a checkpoint that ``torch.save`` cannot write, by trying each; nothing is kept.

    Example:
        >>> unsavable({"step": 3, "hook": lambda: None})
        ["checkpoint['hook']"]

    """
    found = []
    for key, value in checkpoint.items():
        try:
            torch.save(value, _Nowhere())  # type: ignore[arg-type]
        except Exception:  # whatever a class's own pickling raises
            found.append(f"checkpoint[{key!r}]")
    return found


def fingerprints(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each tensor's own bytes; of a sharded one, those that are here.

    Example:
        >>> a, b = torch.zeros(2), torch.zeros(2)
        >>> fingerprints({"x": a}) == fingerprints({"x": b})
        True

    """
    found = {}
    for name, tensor in tensors.items():
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        for _, plain in storages(tensor.detach()):
            digest.update(_bytes(plain).numpy().data)
        found[name] = digest.hexdigest()
    return found


def loads_by_class(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is loaded by its class alone, and not by something put in front of the instance."""
    return "load_state_dict" not in vars(optimizer)


def load_differences(
    optimizer: Optimizer, saved: Mapping[str, Any], *, place: str = "", names: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Load a saved state through the optimizer's own loader, into copies, and yield what comes out different.

    One parameter at a time, so that no second state exists; the optimizer itself is not touched.

    Args:
        optimizer: The optimizer whose state was saved.
        saved: What ``state_dict`` returned, perhaps by way of a file.
        place: Where in the checkpoint this is.
        names: What to call places.

    """
    groups: Sequence[Mapping[str, Any]] = saved["param_groups"]
    for group, saved_group in zip(optimizer.param_groups, groups):
        for parameter, key in zip(group["params"], saved_group["params"]):
            if key not in saved["state"]:
                continue
            copy = object.__new__(type(optimizer))
            copy.__dict__.update(optimizer.__dict__)
            copy.defaults = dict(optimizer.defaults)  # torch adds to it while loading
            copy.state, copy.param_groups = defaultdict(dict), [{**group, "params": [parameter]}]
            alone = {**saved, "state": {0: saved["state"][key]}, "param_groups": [{**saved_group, "params": [0]}]}
            copy.load_state_dict(alone)
            where = f"{place}.state.{key}"
            yield from differences(optimizer.state[parameter], copy.state[parameter], place=where, names=names)
