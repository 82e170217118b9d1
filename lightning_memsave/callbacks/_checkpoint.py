"""The checkpoint filter of a run: wired into the strategy, since callback hooks miss weights-only checkpoints.

``Callback.on_save_checkpoint`` is not called for ``save_weights_only=True``, and ``Callback.on_load_checkpoint`` runs
after the weights are loaded. So the filter hooks the methods of the strategy *instance* that read and write them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._session import CHECKPOINT, Session, hook_instance
from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError, IncompatibleMethodsError
from lightning_memsave.planner.compatibility import SHARDED_STRATEGIES
from lightning_memsave.transforms._adapter_files import write_peft
from lightning_memsave.transforms._checkpoint_state import (
    RECORD_KEY,
    Frozen,
    Matched,
    filter_state,
    kept_bytes,
    make_record,
    match_state,
    replaced_base,
)
from lightning_memsave.transforms._optimizer_names import by_name, group_names
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CheckpointFilter", "attach_adapter_checkpoint", "attach_filter"]

NAME = "AdapterCheckpoint"
_ATTRIBUTE = "_memsave_checkpoint"


def attach_adapter_checkpoint(trainer: Trainer, module: LightningModule, method: str) -> None:
    """Make checkpoints of this run adapter checkpoints, unless the user's own ``AdapterCheckpoint`` does.

    For a ``method`` that changes the base (``LoRA``, ``QLoRA``, ``WeightQuantization``), in its ``setup``. On
    DeepSpeed, which writes its own checkpoints, its switch for leaving frozen parameters out is set, and said.

    Raises:
        ConfigurationError: If training in spawned processes could not hand back in any way what was trained.

    """
    session = Session.of(trainer)
    _check_spawn(session, module, method)
    if _callback_of_class(trainer, NAME) is not None:
        return
    kind = session.strategy_kind
    if kind in ("deepspeed", "memsave_zero"):
        trainer.strategy.exclude_frozen_parameters = True  # type: ignore[attr-defined]
        module.strict_loading = False
        session.report(NAME, "DeepSpeed leaves frozen parameters out of its checkpoints; it checks no names on loading")
    elif kind != "fsdp1":  # there the compatibility table refuses every method that asks for this
        attach_filter(trainer, export_peft=False)


def attach_filter(trainer: Trainer, *, export_peft: bool) -> CheckpointFilter:
    """Return this run's checkpoint filter, installing it at the first call."""
    averaging = _callback_of_class(trainer, "WeightAveraging")
    if averaging is not None:
        raise IncompatibleMethodsError(
            f"{NAME} and {type(averaging).__name__} do not combine: averaging keeps, saves and strictly loads a whole "
            "second model, frozen (and quantized) weights included. Remove one of them."
        )
    session = Session.of(trainer)
    return session.shared(CHECKPOINT, lambda: CheckpointFilter(session, export_peft=export_peft))


def _callback_of_class(trainer: Any, name: str) -> Any:
    """Return the first callback of a class of that name, in whichever namespace, or ``None``."""
    return next((c for c in trainer.callbacks if any(cls.__name__ == name for cls in type(c).__mro__)), None)


def _check_spawn(session: Session, module: LightningModule, method: str) -> None:
    trainer = session.trainer
    spawned = getattr(trainer.strategy, "_start_method", "popen") != "popen"
    if not spawned or trainer.state.fn is None or trainer.state.fn.value != "fit":
        return
    if not trainer.checkpoint_callbacks:
        raise ConfigurationError(
            f"{method}: training in spawned processes changes copies of the module, and no checkpoint is written, so "
            'what was trained would be lost. Use Trainer(strategy="ddp"), or keep enable_checkpointing=True.'
        )
    session.report(
        method,
        "training in spawned processes changes copies of the module: the one in this process keeps its old weights. "
        'Read what was trained from the checkpoint (load_adapters), or use Trainer(strategy="ddp").',
        warning=True,
    )
    session.shared("spawned", lambda: _SpawnedModule(session.trainer, module))


class _SpawnedModule:
    """The module of a worker process, which hands no weights back: the one they would be loaded into has other layers.

    Lightning reads ``state_dict()`` in the worker once training is over, after the session. Packed weights have the
    names of floating ones and another shape.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module

    def close(self) -> None:
        """Hold no state from now on; after an exception there may be callbacks that still save it."""
        if not self.trainer.interrupted:
            module: Any = self.module  # torch leaves this method untyped
            module.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.clear())


def _peft_folder(checkpoint: Any) -> Path:
    path = Path(checkpoint)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}-peft")


class CheckpointFilter:
    """Hooks on one strategy: what is saved, what is checked before loading, and optimizer states by name.

    The hooks outlive the session on purpose: ``trainer.save_checkpoint(path)`` after ``fit`` must write the same kind
    of file as during it. The next run of the Trainer replaces them; the module itself carries nothing.
    """

    def __init__(self, session: Session, *, export_peft: bool) -> None:
        self.trainer = session.trainer
        self.strategy: Any = session.trainer.strategy
        self.export_peft = export_peft
        self.sharded = session.strategy_kind in SHARDED_STRATEGIES
        self.session: Session | None = session
        self.frozen: Frozen | None = None
        self._restored: set[str] = set()
        previous = self.strategy.__dict__.get(_ATTRIBUTE)
        if previous is not None:
            previous.uninstall()
        self.strategy.__dict__[_ATTRIBUTE] = self
        hooks: dict[str, Callable[..., Any]] = {
            "setup": self._setup,
            "lightning_module_state_dict": self._state_dict,
            "save_checkpoint": self._save,
            "load_model_state_dict": self._load,
            "load_optimizer_state_dict": self._load_optimizers,
        }
        if export_peft:
            hooks["remove_checkpoint"] = self._remove
        if self.sharded:
            hooks["load_checkpoint"] = self._load_sharded
        self._undo = [hook_instance(self.strategy, name, around) for name, around in hooks.items()]

    @property
    def module(self) -> LightningModule:
        """The module of the run, without wrappers."""
        module: LightningModule = self.strategy.lightning_module
        return module

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn is not None and self.trainer.state.fn.value == "fit"

    def close(self) -> None:
        """Forget the session; the hooks stay until the next run of this Trainer."""
        self.session = None

    def uninstall(self) -> None:
        """Take the hooks away; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
        if self.strategy.__dict__.get(_ATTRIBUTE) is self:
            del self.strategy.__dict__[_ATTRIBUTE]

    def _say(self, line: str, *, warning: bool = False) -> None:
        if self.session is not None:
            self.session.report(NAME, line, warning=warning)

    # -- saving ---------------------------------------------------------------------------------------------------
    def _setup(self, inner: Callable[..., None], trainer: Trainer) -> None:
        """Look at the frozen weights once they are where and what they stay: after a restore, a cast and a move."""
        inner(trainer)
        self.frozen = Frozen(self.module)
        self.frozen.moved |= self._restored
        if self._fitting:
            kept, whole = kept_bytes(self.module)
            self._say(f"checkpoints hold {format_bytes(kept)} of the module's {format_bytes(whole)}")

    def _moved(self) -> set[str]:
        if self.frozen is None:
            self.frozen = Frozen(self.module)
        moved = self.frozen.update(self.module)
        if self.sharded:
            from lightning_memsave.transforms._sharded_checkpoint import union

            moved |= union(moved)
        return moved

    def _state_dict(self, inner: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        if not self.sharded:
            return filter_state(self.module, inner(), self._moved())
        from lightning_memsave.transforms._sharded_checkpoint import sharded_state

        return sharded_state(self.strategy.model, self._moved(), full=not self.strategy._save_distributed_checkpoint)

    def _save(self, inner: Callable[..., None], checkpoint: dict[str, Any], filepath: Any, **options: Any) -> None:
        """Add the record, write the file, then the PEFT folder beside it."""
        moved = self._moved()
        # Again, since callbacks and the module's own on_save_checkpoint may have put weights back.
        checkpoint["state_dict"] = filter_state(self.module, checkpoint["state_dict"], moved)
        if self.sharded or self.trainer.is_global_zero:
            checkpoint[RECORD_KEY] = self._record()
        adapters = self._adapters() if self.export_peft else {}
        inner(checkpoint, filepath, **options)
        if self.export_peft and self.trainer.is_global_zero:
            self._export(adapters, filepath)

    def _export(self, adapters: Mapping[str, Any], filepath: Any) -> None:
        if "://" in str(filepath):
            self._say(f"no PEFT folder is written beside {filepath}: only local folders are supported", warning=True)
            return
        for line in write_peft(self.module, adapters, _peft_folder(filepath)):
            self._say(line, warning=True)

    def _remove(self, inner: Callable[..., None], filepath: Any) -> None:
        """Remove the PEFT folder of a checkpoint that is removed, e.g. one that is not among the best any more."""
        inner(filepath)
        if self.trainer.is_global_zero and "://" not in str(filepath):
            shutil.rmtree(_peft_folder(filepath), ignore_errors=True)

    def _record(self) -> dict[str, Any]:
        assert self.frozen is not None
        return {
            **make_record(self.module, self.frozen),
            "optimizers": [group_names(self.module, optimizer) for optimizer in self.strategy.optimizers],
        }

    def _adapters(self) -> dict[str, Any]:
        state = filter_state(self.module, self.module.state_dict())
        if not self.sharded:
            return state
        from lightning_memsave.transforms._sharded_checkpoint import gather_full

        return gather_full(state)

    # -- loading --------------------------------------------------------------------------------------------------
    def _match(self, saved: Mapping[str, Any], record: Mapping[str, Any] | None) -> Matched:
        """Check a checkpoint against the module before any weight is touched."""
        try:
            matched = match_state(self.module, saved, record, base_alone=not self._fitting)
        except CheckpointMismatchError as error:
            if self.module.strict_loading:
                raise
            self._say(f"strict_loading=False, so what fits is loaded. {error}", warning=True)
            names = self.module.state_dict()
            return Matched({key: value for key, value in saved.items() if key in names})
        for note in matched.notes:
            self._say(note)
        self._restored = replaced_base(self.module, matched.state)
        if self.frozen is not None:
            self.frozen.moved |= self._restored
        return matched

    def _load(self, inner: Callable[..., None], checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.sharded:  # already loaded by load_checkpoint
            return
        matched = self._match(checkpoint["state_dict"], checkpoint.get(RECORD_KEY))
        inner({**checkpoint, "state_dict": matched.state}, strict=False)

    def _load_optimizers(self, inner: Callable[..., None], checkpoint: Mapping[str, Any]) -> None:
        record = checkpoint.get(RECORD_KEY)
        if record is None or self.sharded:
            inner(checkpoint)
            return
        states = []
        regroup = not checkpoint.get("lr_schedulers")
        for optimizer, state, saved in zip(
            self.strategy.optimizers, checkpoint["optimizer_states"], record["optimizers"]
        ):
            here = group_names(self.module, optimizer)
            known = saved is not None and here is not None
            states.append(by_name(state, saved, here or [], regroup=regroup) if known else state)
        inner({**checkpoint, "optimizer_states": states})

    def _load_sharded(
        self, inner: Callable[..., dict[str, Any]], checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        from lightning_memsave.transforms._sharded_checkpoint import read_record, restore

        path = Path(self.strategy.broadcast(checkpoint_path))
        if read_record(path, weights_only=weights_only) is None:
            return inner(path, weights_only=weights_only)
        return restore(path, self.strategy.model, self.strategy.optimizers, self._match, weights_only=weights_only)
