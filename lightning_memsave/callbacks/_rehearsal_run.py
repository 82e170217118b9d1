"""The rehearsal of one checkpoint: the Trainer's own way of making it, a folder that goes away, and the comparison."""

from __future__ import annotations

import itertools
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from lightning_memsave.callbacks._session import CHECKPOINT, Session, hook_instance
from lightning_memsave.optim.rehearsal import (
    differences,
    fingerprints,
    load_differences,
    loads_by_class,
    tensor_bytes,
    unsavable,
)
from lightning_memsave.planner.compatibility import SHARDED_STRATEGIES
from lightning_memsave.transforms._optimizer_names import group_names
from lightning_memsave.units import format_bytes

__all__ = ["Rehearsal", "Rehearsed", "why_not"]

_MOST = 5  # problems that are shown
_FOLDER = "checkpoint-rehearsal"
_COMPARED = ("single", "ddp", "ddp_spawn", "memsave_ddp", "other")


@dataclass
class Rehearsed:
    """What came out of it; ``problems`` of all ranks."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    how: str = "read, compared bit by bit and loaded back"
    size: int = 0
    writing: float = 0.0
    seconds: float = 0.0


def why_not(trainer: Any) -> str:
    """Return why a run writes no checkpoint that could be rehearsed, or nothing."""
    if trainer.fast_dev_run:
        return "fast_dev_run writes no checkpoints"
    if not trainer.checkpoint_callbacks:
        return "the Trainer writes no checkpoints (enable_checkpointing=False)"
    return ""


class Rehearsal:
    """One rehearsal. Whatever happens on a rank, all ranks go through the same steps and come to the same answer."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.trainer: Any = session.trainer
        self.strategy: Any = session.trainer.strategy
        self.module: Any = session.trainer.lightning_module
        self.written: dict[str, Any] = {}
        self.done = Rehearsed()

    def run(self) -> Rehearsed:
        """Write, read, compare, load back and remove; the folder goes away whatever happens."""
        begin = time.monotonic()
        folder = Path(self.strategy.broadcast(str(self._folder())))
        path = folder / "rehearsal.ckpt"
        try:
            self._together(lambda: self._begin(folder))
            if self._together(lambda: self._write(path)):
                self.done.writing = time.monotonic() - begin
                self._together(lambda: self._measure(path))
                self._together(lambda: self._check(path))
        finally:
            self.strategy.barrier("checkpoint rehearsal")
            if self.trainer.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
        self.done.seconds = time.monotonic() - begin
        return self.done

    def _folder(self) -> Path:
        """Return a new folder where this run's checkpoints go, or in the run's own folder if that is no local place."""
        places = [getattr(callback, "dirpath", None) for callback in self.trainer.checkpoint_callbacks]
        local = [place for place in places if place and "://" not in str(place)]
        return Path(local[0] if local else self.session.directory) / _FOLDER

    def _together(self, step: Callable[[], None]) -> bool:
        """Run a step on this rank and return whether it went well on all; what went wrong is a problem of all."""
        if self.done.problems:
            return False
        try:
            step()
        except Exception as error:
            self.done.problems.append(_short(error))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everywhere, self.done.problems)
            found = dict.fromkeys(problem for problems in everywhere for problem in problems)
            self.done.problems = list(found)[:_MOST]
        return not self.done.problems

    def _add(self, problems: Iterator[str]) -> None:
        self.done.problems += itertools.islice(problems, max(0, _MOST - len(self.done.problems)))

    # -- writing --------------------------------------------------------------------------------------------------
    def _begin(self, folder: Path) -> None:
        if not self.trainer.is_global_zero:
            return
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        need = tensor_bytes([*self.module.state_dict().values()])
        if not self._weights_only():
            need += tensor_bytes([list(optimizer.state.values()) for optimizer in self.trainer.optimizers])
        free = shutil.disk_usage(folder).free
        if need > free:
            raise OSError(
                f"a checkpoint holds about {format_bytes(need)}, and {folder.parent} has {format_bytes(free)}"
            )

    def _weights_only(self) -> bool:
        return all(getattr(callback, "save_weights_only", False) for callback in self.trainer.checkpoint_callbacks)

    def _write(self, path: Path) -> None:
        """Do what ``trainer.save_checkpoint`` does, and keep what is handed to the writer of the file."""
        undo = hook_instance(self.strategy.checkpoint_io, "save_checkpoint", self._keep)
        try:
            checkpoint = self.trainer._checkpoint_connector.dump_checkpoint(self._weights_only())
            self.strategy.save_checkpoint(checkpoint, path)
        except Exception as error:
            culprits = [*_without_state(self.trainer.optimizers), *unsavable(self.written)]
            raise RuntimeError(f"cannot be saved: {', '.join(culprits) or 'see why'}: {_short(error)}") from error
        finally:
            undo()
        executor = getattr(self.strategy.checkpoint_io, "_executor", None)
        if executor is not None:  # an asynchronous writer: wait until its one thread is free again
            executor.submit(lambda: None).result()
            if self.strategy.checkpoint_io._error is not None:
                raise self.strategy.checkpoint_io._error

    def _keep(self, inner: Callable[..., Any], checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        self.written = checkpoint
        inner(checkpoint, *args, **kwargs)

    def _measure(self, path: Path) -> None:
        if self.trainer.is_global_zero:
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            self.done.size = sum(file.stat().st_size for file in files)
            if not files:
                raise FileNotFoundError(f"{type(self.strategy).__name__} wrote nothing to {path}")

    # -- reading --------------------------------------------------------------------------------------------------
    def _check(self, path: Path) -> None:
        kind = self.session.strategy_kind
        if kind in SHARDED_STRATEGIES:
            self._check_sharded(path)
        elif kind not in _COMPARED:
            self.done.how = f"and neither read nor compared on {type(self.strategy).__name__},"
        elif self.trainer.is_global_zero:
            self._check_file(path)

    def _read(self, path: Path) -> Any:
        """Read a file in place of memory: a tensor is in memory only while it is compared."""
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            lines = str(error).splitlines()
            reason = next((line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
            self.done.notes.append(
                "the checkpoint holds objects of other classes than tensors and plain data, so it is loaded with "
                f"trainer.fit(..., weights_only=False) only: {reason}"
            )
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True)

    def _check_file(self, path: Path) -> None:
        found, names = self._read(path), self._names()
        self._add(differences(self.written, found, names=names))
        if self.done.problems:
            return
        self._load_weights(found)
        for number, optimizer in enumerate(self.trainer.optimizers if "optimizer_states" in found else []):
            saved, place = found["optimizer_states"][number], f"optimizer_states[{number}]"
            if hasattr(optimizer, "consolidate_state_dict") or not isinstance(optimizer, Optimizer):
                self.done.how = f"read and compared bit by bit ({type(optimizer).__name__} was not loaded back)"
                continue
            try:
                self._load_optimizer(optimizer, saved, place, names)
            except Exception as error:
                self.done.problems.append(f"{place} cannot be loaded by {type(optimizer).__name__}: {_short(error)}")

    def _load_optimizer(self, optimizer: Optimizer, saved: Any, place: str, names: dict[str, str]) -> None:
        if loads_by_class(optimizer):
            self._add(load_differences(optimizer, saved, place=place, names=names))
            return
        optimizer.load_state_dict(saved)
        self._add(differences(saved, optimizer.state_dict(), place=place, names=names))

    def _load_weights(self, found: Any) -> None:
        """Load the weights back, if they are the module's own: averages of a callback would change the run."""
        here = self.module.state_dict()
        if self.session.find_shared(CHECKPOINT) is not None:
            return  # written and checked by AdapterCheckpoint
        if next(differences(here, found["state_dict"]), None) is not None:
            self.done.how = "read and compared bit by bit (its weights are not those of the module: not loaded back)"
            return
        before = fingerprints(self._tensors())
        try:
            self.strategy.load_model_state_dict(found, strict=self.module.strict_loading)
        except Exception as error:
            self.done.problems.append(f"state_dict cannot be loaded by {type(self.module).__name__}: {_short(error)}")
        self._add(_changed(before, fingerprints(self._tensors())))

    def _check_sharded(self, path: Path) -> None:
        """Load weights and optimizer states back as a resumed run does, and see that nothing changed."""
        if self.trainer.is_global_zero and path.is_file():
            self._add(differences(self.written, self._read(path), names=self._names()))
        before = fingerprints(self._tensors())
        self.strategy.load_checkpoint(path)
        self._add(_changed(before, fingerprints(self._tensors())))

    def _names(self) -> dict[str, str]:
        """Return what to call the states of an optimizer: the parameters they belong to."""
        names = {}
        for number, optimizer in enumerate(self.trainer.optimizers):
            groups = group_names(self.module, optimizer) if hasattr(optimizer, "param_groups") else None
            for key, name in enumerate(itertools.chain(*(groups or []))):
                names[f"optimizer_states[{number}].state.{key}"] = name
        return names

    def _tensors(self) -> dict[str, Any]:
        """Return everything that trains: parameters, buffers and the state of each parameter."""
        named = dict(self.module.named_parameters())
        found: dict[str, Any] = {**named, **dict(self.module.named_buffers())}
        names = {id(parameter): name for name, parameter in named.items()}
        for number, optimizer in enumerate(self.trainer.optimizers):
            for parameter, state in getattr(optimizer, "state", {}).items():
                for key, value in state.items() if isinstance(state, dict) else ():
                    if isinstance(value, torch.Tensor):
                        found[f"{key} of {names.get(id(parameter), 'a parameter')} in optimizer {number}"] = value
        return found


def _without_state(optimizers: list[Any]) -> Iterator[str]:
    for number, optimizer in enumerate(optimizers):
        try:
            optimizer.state_dict()
        except Exception:
            yield f"the state of {type(optimizer).__name__} (optimizer {number})"


def _short(error: Exception) -> str:
    """Return an error in at most a few lines: lists of keys can be endless."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 600 else f"{text[:600]} ..."


def _changed(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    for name in before:
        if name not in after:
            yield f"{name} is missing after loading"
        elif before[name] != after[name]:
            yield f"{name} has other values after loading"
    for name in after:
        if name not in before:
            yield f"{name} was not there before loading"
