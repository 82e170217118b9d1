"""What OptimizerOffload does in one run: which optimizers it moves, and how Lightning's loop reaches them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._lightning import NAMESPACES
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session, hook_instance
from lightning_memsave.optim._offload_boundary import Boundary
from lightning_memsave.optim._offload_checkpoint import is_local, read_checkpoint, write_checkpoint
from lightning_memsave.optim._offload_phases import Parking, averaged_models, storages_of
from lightning_memsave.optim.disk_state import DiskState, is_in_memory
from lightning_memsave.optim.offload import (
    HostNeed,
    Offloaded,
    boundary_of_parameters,
    check_room,
    host_need,
    offload_optimizer,
)
from lightning_memsave.planner.compatibility import SHARDED_STRATEGIES
from lightning_memsave.units import format_bytes, parse_size

if TYPE_CHECKING:
    from lightning_memsave.callbacks.optimizer_offload import OptimizerOffload

__all__ = ["EvaluationRun", "HostRun", "MappedCheckpoints", "run_problems"]

_NAME = "OptimizerOffload"
_READERS = ("on_after_backward", "on_before_optimizer_step")


# -- what cannot run ---------------------------------------------------------------------------------------------------
def run_problems(owner: OptimizerOffload, session: Session, module: Any) -> list[str]:
    """Return one sentence for everything in this run that does not go with what was asked."""
    trainer = session.trainer
    problems = []
    if session.strategy_kind in SHARDED_STRATEGIES and owner.when == "always":
        problems.append(
            "FSDP2 keeps shards, gradients and state on the host itself: "
            "fully_shard(..., offload_policy=CPUOffloadPolicy()). Here, when='evaluation' works."
        )
    optimizers: list[Any] = [o for o in trainer.optimizers if hasattr(o, "param_groups")]
    if not optimizers:
        problems.append("configure_optimizers returned no optimizer. Return one, or remove OptimizerOffload.")
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and any(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers):
        problems.append("a fused optimizer unscales gradients inside of its step, on the device. Write fused=False.")
    if owner.gradients:
        problems += _gradient_problems(session, module, scaler)
    return problems


def _gradient_problems(session: Session, module: Any, scaler: Any) -> Iterator[str]:
    trainer = session.trainer
    if not module.automatic_optimization or len(trainer.optimizers) > 1:
        yield "gradients=True needs automatic optimization with one optimizer. Write gradients=False."
    if scaler is not None:
        yield "loss scaling looks at all gradients on the device. Write precision='bf16-mixed', or gradients=False."
    if session.strategy_kind in ("ddp", "ddp_spawn"):
        yield (
            "DDP averages gradients in buckets on the device that hold a full set of them. "
            "Use strategy='memsave_ddp', or write gradients=False."
        )
    if "GradientRelease" in session.methods:
        yield "GradientRelease already frees each gradient in backward. Write gradients=False, or remove it."
    for name in ("configure_gradient_clipping", "optimizer_zero_grad"):
        if _overrides(module, name):
            yield f"{type(module).__name__}.{name} works on gradients on the device. Write gradients=False."


def _overrides(module: Any, name: str) -> bool:
    stock = [getattr(namespace.LightningModule, name) for namespace in NAMESPACES]
    return getattr(type(module), name) not in stock


def _gradient_readers(trainer: Any, module: Any) -> list[str]:
    """Return the user's hooks between backward and the step."""
    found = [f"{type(module).__name__}.{name}" for name in _READERS if _overrides(module, name)]
    for callback in trainer.callbacks:
        if isinstance(callback, Saver):
            continue
        stock = [getattr(namespace.Callback, name) for namespace in NAMESPACES for name in _READERS]
        found += [f"{type(callback).__name__}.{n}" for n in _READERS if getattr(type(callback), n) not in stock]
    return found


# -- when="always" -----------------------------------------------------------------------------------------------------
class HostRun:
    """The optimizers of one fit, stepped on the host."""

    def __init__(self, owner: OptimizerOffload, session: Session, module: Any) -> None:
        self._owner = owner
        self._session = session
        self._module = module
        self._undo: list[Callable[[], None]] = []
        self.offloaded: list[Offloaded] = []
        trainer = session.trainer
        optimizers = list(trainer.optimizers)
        boundary = boundary_of_parameters(optimizers, master_weights=owner.master_weights)
        directory = None if owner.device == "cpu" else Path(owner.device)
        if boundary is None and directory is None:
            session.report(_NAME, "inactive: the module is on the CPU, and so are its optimizer state and gradients")
            return
        self._gradients = owner.gradients and boundary is not None
        need = host_need(
            optimizers,
            crosses=boundary is not None,
            gradients=self._gradients,
            master_weights=owner.master_weights,
        )
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or trainer.num_devices
        budget = None if owner.host_budget is None else parse_size(owner.host_budget)
        check_room(need, directory=directory, num_local_ranks=num_ranks, host_budget=budget)
        try:
            self._install(optimizers, boundary, None if directory is None else DiskState(directory))
        except BaseException:
            self.close()
            raise
        self._report(need, optimizers, directory)

    def _install(self, optimizers: list[Any], boundary: Boundary | None, disk: DiskState | None) -> None:
        strategy = self._session.trainer.strategy
        for optimizer in optimizers:
            self.offloaded.append(
                offload_optimizer(
                    optimizer,
                    boundary=boundary,
                    disk=disk,
                    master_weights=self._owner.master_weights,
                    gradients=self._gradients,
                    register=getattr(strategy, "register_reduced_hook", None),
                )
            )
        self._undo.append(hook_instance(strategy, "load_optimizer_state_dict", self._load))
        if self._gradients:
            self._undo.append(hook_instance(strategy.precision_plugin, "main_params", self._main_params))
        checkpoints = self._session.find_shared(f"{_NAME}.checkpoints")
        if isinstance(checkpoints, MappedCheckpoints):
            checkpoints.disk = disk

    def _report(self, need: HostNeed, optimizers: list[Any], directory: Path | None) -> None:
        report = self._session.report
        names = ", ".join(type(o).__name__ for o in optimizers)
        place = "host memory" if directory is None else f"files in {directory}"
        state = "state of unknown size" if need.state is None else f"{format_bytes(need.state + need.masters)} of state"
        report(_NAME, f"{names}: {state} in {place}, stepped on the host ({need.parts()})")
        if self._owner.gradients and not self._gradients:
            report(_NAME, "gradients=True has nothing to move: gradients are on the CPU already")
        if directory is not None and is_in_memory(directory):
            report(_NAME, f"{directory} is on a tmpfs, which is memory: choose a directory on a disk", warning=True)

    def start(self) -> None:
        """Step inside of backward if nothing comes between a gradient and its step."""
        trainer = self._session.trainer
        readers = _gradient_readers(trainer, self._module)
        for offloaded in self.offloaded:
            if offloaded.gradients is None:
                continue
            offloaded.gradients.refresh()
            offloaded.gradients.step_in_backward = not readers and not trainer.gradient_clip_val
            if readers:
                self._session.report(_NAME, f"gradients=True: no gradients are seen by {', '.join(readers)}")
            how = "inside of backward" if offloaded.gradients.step_in_backward else "after backward"
            self._session.report(_NAME, f"gradients leave the device in backward; parameters are stepped {how}")

    def _load(self, inner: Callable[..., None], checkpoint: Any) -> None:
        # The strategy moves what was loaded to the device, where there may be no room for it.
        for offloaded in self.offloaded:
            offloaded.hold()
        try:
            inner(checkpoint)
        finally:
            for offloaded in self.offloaded:
                offloaded.let_go()

    def _main_params(self, inner: Callable[..., Any], optimizer: Any) -> Any:
        for offloaded in self.offloaded:
            if offloaded.gradients is not None and offloaded.host_step.optimizer is optimizer:
                return offloaded.gradients.clippable()
        return inner(optimizer)

    def close(self) -> None:
        """Give the optimizers and the strategy their methods back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
        while self.offloaded:
            self.offloaded.pop().close()


class MappedCheckpoints:
    """Checkpoints of state that is on disk: mapped when they are read, written without a copy in memory.

    Only where the Trainer's plugin is Lightning's own and the path is local; else everything is as ever.
    """

    def __init__(self, trainer: Any) -> None:
        self.disk: DiskState | None = None
        plugin = trainer.strategy.checkpoint_io
        self._undo: list[Callable[[], None]] = []
        if type(plugin).__name__ == "TorchCheckpointIO":
            self._undo = [
                hook_instance(plugin, "load_checkpoint", self._read),
                hook_instance(plugin, "save_checkpoint", self._write),
            ]

    def _read(self, inner: Callable[..., Any], path: Any, *args: Any, **options: Any) -> Any:
        if args or set(options) - {"weights_only"} or not is_local(path) or not Path(path).is_file():
            return inner(path, *args, **options)
        return read_checkpoint(path, weights_only=options.get("weights_only", False))

    def _write(self, inner: Callable[..., Any], checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not is_local(path):
            inner(checkpoint, path, storage_options)
            return
        write_checkpoint(checkpoint, path)
        if self.disk is not None:
            self.disk.release()

    def close(self) -> None:
        """Give the plugin its methods back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()


# -- when="evaluation" -------------------------------------------------------------------------------------------------
class EvaluationRun:
    """Moves optimizer state and averaged weights to the host while a validation runs."""

    def __init__(self, owner: OptimizerOffload, session: Session) -> None:
        self._session = session
        self._reported = False
        trainer: Any = session.trainer
        boundary = boundary_of_parameters(trainer.optimizers)
        self.parking = None if boundary is None else Parking(boundary)
        self._budget = None if owner.host_budget is None else parse_size(owner.host_budget)
        self._undo: list[Callable[[], None]] = []
        if self.parking is None:
            session.report(_NAME, "inactive: the module is on the CPU, and so is its optimizer state")
            return
        self._averages = [(c, model) for c in trainer.callbacks for model in averaged_models(c)]
        for optimizer in trainer.optimizers:
            # what reads or steps the optimizer meanwhile finds it whole
            self._undo.append(optimizer.register_state_dict_pre_hook(self._bring_back).remove)
            self._undo.append(optimizer.register_step_pre_hook(self._bring_back).remove)
        for callback, model in self._averages:
            self._undo.append(model.register_state_dict_pre_hook(self._bring_back).remove)  # type: ignore[no-untyped-call]
            for name in ("on_validation_epoch_end", "on_exception"):  # it exchanges the weights back there
                self._undo.append(hook_instance(callback, name, self._whole))

    def begin(self) -> None:
        """Move the state; before the first step there is none."""
        if self.parking is None:
            return
        states = [state for optimizer in self._session.trainer.optimizers for state in optimizer.state.values()]
        self.parking.park(storages_of(states), budget=self._budget)

    def park_averages(self) -> None:
        """Move the averaged models, or the present weights that wait in them."""
        if self.parking is None:
            return
        values = [[*model.parameters(), *model.buffers()] for _, model in self._averages]
        self.parking.park(storages_of(values), budget=self._budget)
        if self.parking.nbytes and not self._reported:
            self._reported = True
            size = format_bytes(self.parking.nbytes)
            self._session.report(
                _NAME, f"{size} of optimizer state and averaged weights wait on the host in validation"
            )

    def end(self) -> None:
        """Move everything back."""
        if self.parking is not None:
            self.parking.bring_back()

    def _bring_back(self, *ignored: Any) -> None:
        self.end()

    def _whole(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.end()
        return inner(*args, **kwargs)

    def close(self) -> None:
        """Move everything back and take the hooks away; a second call does nothing."""
        self.end()
        while self._undo:
            self._undo.pop()()
