"""Adapter checkpoints of a module whose parameters are DTensors (FSDP2, tensor parallel).

Both layouts that Lightning's ``ModelParallelStrategy`` writes are read and written: a folder to which every rank adds
its shards, and one file with whole tensors. Every function here is collective: call it on all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.transforms._checkpoint_state import RECORD_KEY, Matched, canonical, filter_state
from lightning_memsave.transforms._optimizer_names import by_name, group_names, keyed_by_name

__all__ = ["gather_full", "is_sharded_folder", "read_folder", "read_record", "restore", "sharded_state", "union"]

_EXTRA = "meta.pt"  # where Lightning keeps what is neither weight nor optimizer state
Match = Callable[[Mapping[str, Any], Mapping[str, Any] | None], Matched]


def is_sharded_folder(path: Path) -> bool:
    """Return whether a path is a folder of shards."""
    return path.is_dir() and (path / ".metadata").is_file()


def union(names: Collection[str]) -> set[str]:
    """Return the names that any rank holds."""
    found: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, set(names))
    return set().union(*found)


def sharded_state(model: nn.Module, moved: Collection[str], *, full: bool) -> dict[str, Any]:
    """Return what a checkpoint keeps of a sharded module; frozen parameters are not gathered.

    Args:
        model: The module the strategy runs.
        moved: Canonical names of frozen parameters to keep.
        full: Whole tensors on rank zero (and nothing elsewhere) rather than this rank's shards.

    """
    options = StateDictOptions(full_state_dict=full, cpu_offload=True, ignore_frozen_params=not moved)
    return filter_state(model, get_model_state_dict(model, options=options), moved)


def gather_full(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of whole tensors, on every rank."""
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def read_record(path: Path, *, weights_only: bool | None) -> Mapping[str, Any] | None:
    """Return our record of a checkpoint, without its tensors, or ``None`` for a plain checkpoint."""
    file = path / _EXTRA if is_sharded_folder(path) else path
    if not file.is_file():
        return None
    record: Mapping[str, Any] | None = torch.load(
        file, map_location="cpu", mmap=file is path, weights_only=weights_only
    ).get(RECORD_KEY)
    return record


def restore(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], match: Match, *, weights_only: bool | None
) -> dict[str, Any]:
    """Load a checkpoint of ours into a sharded module and its optimizers.

    Args:
        path: A folder of shards, or a file.
        model: The module the strategy runs.
        optimizers: Empty when nothing is trained.
        match: Checks what the checkpoint holds against the module and says what to load.
        weights_only: As in ``torch.load``.

    Returns:
        Everything else the checkpoint holds.

    Raises:
        CheckpointMismatchError: If weights or optimizer states are not those of this module.

    """
    if is_sharded_folder(path):
        return _restore_folder(path, model, optimizers, match, weights_only)
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    record = checkpoint[RECORD_KEY]
    matched = match(checkpoint.pop("state_dict"), record)
    set_model_state_dict(model, matched.state, options=StateDictOptions(full_state_dict=True, strict=False))
    if optimizers:
        states = checkpoint.get("optimizer_states")
        _check_count(states, optimizers)
        for state, names, optimizer in zip(states, record["optimizers"], optimizers):
            here = _check_names(model, optimizer, names)
            named = keyed_by_name(by_name(state, names, here, regroup=True), here)
            set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))
    return dict(checkpoint)


def _restore_folder(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], match: Match, weights_only: bool | None
) -> dict[str, Any]:
    extra: dict[str, Any] = torch.load(path / _EXTRA, map_location="cpu", weights_only=weights_only)
    record = extra[RECORD_KEY]
    shapes = _shapes(path)
    wanted = {canonical(key) for key in match(_under("state_dict", shapes), record).state}
    state = {key: value for key, value in get_model_state_dict(model).items() if canonical(key) in wanted}
    load_shards({"state_dict": state}, storage_reader=FileSystemReader(path))
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    if optimizers:
        saved = {key.split(".")[0] for key in shapes if key.startswith("optimizer_")}
        _check_count(saved, optimizers)
    for index, optimizer in enumerate(optimizers):
        _check_names(model, optimizer, record["optimizers"][index])
        part = {f"optimizer_{index}": get_optimizer_state_dict(model, optimizer)}
        load_shards(part, storage_reader=FileSystemReader(path))
        set_optimizer_state_dict(model, optimizer, part[f"optimizer_{index}"])
    return extra


def read_folder(path: Path) -> dict[str, Any]:
    """Return the whole weights of a folder of shards, in one process and with no process group.

    Returns:
        ``state_dict`` and what Lightning kept beside it.

    """
    state = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in _under("state_dict", _shapes(path)).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        load_shards({"state_dict": state}, storage_reader=FileSystemReader(path), no_dist=True)
    extra: dict[str, Any] = torch.load(path / _EXTRA, map_location="cpu", weights_only=True)
    return {**extra, "state_dict": state}


def _shapes(path: Path) -> dict[str, Tensor]:
    """Return the entries of a folder of shards that are tensors, as meta tensors."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _under(prefix: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in entries.items() if key.startswith(f"{prefix}.")}


def _check_count(saved: Collection[Any] | None, optimizers: Sequence[Optimizer]) -> None:
    if not saved:
        raise CheckpointMismatchError(
            "The checkpoint holds weights only and no optimizer state, so training cannot go on from it. Save with "
            "ModelCheckpoint(save_weights_only=False), or load the weights with load_adapters and start a new run."
        )
    if len(saved) != len(optimizers):
        raise CheckpointMismatchError(
            f"The checkpoint holds the state of {len(saved)} optimizers and the module has {len(optimizers)}. Return "
            "the same optimizers from configure_optimizers as in the run that saved it."
        )


def _check_names(model: nn.Module, optimizer: Optimizer, saved: Sequence[Sequence[str]] | None) -> list[list[str]]:
    """Return the names of an optimizer's groups after checking that they are the saved ones."""
    here = group_names(model, optimizer)
    if here is None or saved is None:
        raise CheckpointMismatchError(
            f"The state of {type(optimizer).__name__} cannot be restored by name: it holds tensors that are no "
            "parameters of the module. Give it the module's own parameters."
        )
    by_name({"param_groups": [{"params": list(group)} for group in saved]}, saved, here, regroup=True)
    return here
