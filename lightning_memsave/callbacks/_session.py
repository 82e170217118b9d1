"""What all savers of one Trainer share: one transform pass, one context stack, one optimizer hook, one report.

Nothing here is public. A callback reaches it with ``Session.of(trainer)`` in its ``setup`` and never keeps it, so
that callbacks stay configuration: deep-copyable and picklable.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lightning_memsave.callbacks._lightning import strategy_kind
from lightning_memsave.planner.compatibility import cell, check_methods
from lightning_memsave.transforms._pass import AppliedTransforms, Transform, TransformPass
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CHECKPOINT", "Session", "describe", "hook_instance", "logger"]

_ATTRIBUTE = "_memsave"
CHECKPOINT = "checkpoint"  # key of the shared checkpoint filter
_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "backward")

logger = logging.getLogger("lightning_memsave")
if not logger.handlers:
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Closable(Protocol):
    """Something a session owns and closes."""

    def close(self) -> None:
        """Undo what it installed; a second call does nothing."""


ClosableT = TypeVar("ClosableT", bound=Closable)


class _StepContexts:
    """Contexts around the strategy's steps *and* its backward (a recompute in backward must see them too)."""

    def __init__(self, strategy: Any) -> None:
        self.factories: dict[str, Callable[[str], AbstractContextManager[Any]]] = {}
        self._undo = [hook_instance(strategy, name, self._around(name)) for name in _STEPS if hasattr(strategy, name)]

    def _around(self, phase: str) -> Callable[..., Any]:
        def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for factory in self.factories.values():
                    stack.enter_context(factory(phase))
                return inner(*args, **kwargs)

        return call

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()


class _TransformRun:
    """The transform pass of this run: runs when the model exists, undone at teardown."""

    def __init__(self) -> None:
        self.transform_pass = TransformPass()
        self.applied: AppliedTransforms | None = None

    def close(self) -> None:
        if self.applied is not None:
            self.applied.undo(persistent=False)


class Session:
    """The savers of one Trainer, from the first ``setup`` to ``teardown``.

    Use from a callback's ``setup``::

        session = Session.of(trainer)
        session.register(self, pl_module)                  # conflicts are checked before the model is touched
        session.add_transform(Transform(...))              # runs once the model exists
        session.add_context("name", lambda phase: ...)     # around steps and backward
        session.on_optimizers(pl_module, convert)          # what configure_optimizers returned -> what is used
        session.shared("key", lambda: Thing(session))      # one Thing for all clients, closed with the session
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.methods: dict[str, Any] = {}
        self.lines: list[tuple[str, str]] = []
        self.ended = False
        self._shared: dict[str, Closable] = {}
        self._armed: list[Callable[[], None]] = []

    # -- life -----------------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, trainer: Trainer) -> Session:
        """Return the Trainer's session of this run, starting one if there is none or the last run has ended."""
        session = trainer.__dict__.get(_ATTRIBUTE)
        if session is not None and session.ended:
            session.close()
            session = None
        if session is None:
            session = trainer.__dict__[_ATTRIBUTE] = cls(trainer)
        return session

    @classmethod
    def find(cls, trainer: Trainer) -> Session | None:
        """Return the Trainer's session of this run, or ``None`` if no saver is active."""
        session: Session | None = trainer.__dict__.get(_ATTRIBUTE)
        return session if session is not None and not session.ended else None

    def end(self) -> None:
        """Take back what does not outlive the run, after ``teardown`` or an exception.

        The checkpoint filter stays until the next run: ``trainer.save_checkpoint(...)`` after ``fit``, and callbacks
        that save on an exception, come after ours.
        """
        self.ended = True
        for key in [k for k in reversed(self._shared) if k != CHECKPOINT]:
            self._shared.pop(key).close()
        self._disarm()

    def close(self) -> None:
        """Take back everything, checkpoint filters too; a second call does nothing."""
        while self._shared:
            self._shared.popitem()[1].close()
        self._disarm()
        if self.trainer.__dict__.get(_ATTRIBUTE) is self:
            del self.trainer.__dict__[_ATTRIBUTE]

    def _disarm(self) -> None:
        while self._armed:
            self._armed.pop()()

    # -- clients --------------------------------------------------------------------------------------------------
    @property
    def strategy_kind(self) -> str:
        """The strategy's column in the compatibility table."""
        return strategy_kind(self.trainer.strategy)

    @property
    def directory(self) -> Path:
        """Where this run's files go: ``<default_root_dir>/memsave``."""
        return Path(self.trainer.default_root_dir) / "memsave"

    def register(self, callback: Any, module: LightningModule) -> None:
        """Make a callback known to the conflict check, which runs once before the model is touched."""
        self.methods.setdefault(type(callback).__name__, callback)
        if "configure_model" not in module.__dict__:
            self._arm_configure_model(module)

    def add_transform(self, transform: Transform) -> None:
        """Add a transform to this run's pass; the same one twice is one."""
        run = self.shared("transforms", _TransformRun)
        if not run.transform_pass.add(transform):
            self.report(transform.name, "asked for twice with the same settings; applied once")

    def add_context(self, name: str, factory: Callable[[str], AbstractContextManager[Any]]) -> None:
        """Enter ``factory(phase)`` around every step; a phase is ``training_step``, ``backward``, ``test_step`` ..."""
        self.shared("contexts", lambda: _StepContexts(self.trainer.strategy)).factories[name] = factory

    def on_optimizers(self, module: LightningModule, convert: Callable[[Any], Any]) -> None:
        """Pass what ``configure_optimizers`` returns through ``convert``, once, in any of its allowed forms."""
        self._arm_once(module, "configure_optimizers", lambda inner: convert(inner()))

    def before_optimizers(self, module: LightningModule, check: Callable[[], None]) -> None:
        """Call ``check`` once, when the model is complete and ``configure_optimizers`` is about to run."""

        def checked(inner: Callable[[], Any]) -> Any:
            check()
            return inner()

        self._arm_once(module, "configure_optimizers", checked)

    def around_optimizers(self, module: LightningModule, around: Callable[[Callable[[], Any]], Any]) -> None:
        """Call ``around(configure_optimizers)`` once in place of ``configure_optimizers``."""
        self._arm_once(module, "configure_optimizers", around)

    def shared(self, key: str, factory: Callable[[], ClosableT]) -> ClosableT:
        """Return the one object of that key, made at the first call and closed with the session."""
        if key not in self._shared:
            self._shared[key] = factory()
        return self._shared[key]  # type: ignore[return-value]

    def find_shared(self, key: str) -> Closable | None:
        """Return the object of that key if somebody made it."""
        return self._shared.get(key)

    def report(self, name: str, line: str, *, warning: bool = False) -> None:
        """Say one line on rank zero (``[memsave] name: line``) and keep it for the audit."""
        self.lines.append((name, line))
        if not self.trainer.is_global_zero:
            return
        if warning:
            warnings.warn(f"[memsave] {name}: {line}", UserWarning, stacklevel=2)
        else:
            logger.info("[memsave] %s: %s", name, line)

    @property
    def applied(self) -> AppliedTransforms | None:
        """What the transform pass did, or ``None`` before it ran."""
        run = self._shared.get("transforms")
        return run.applied if isinstance(run, _TransformRun) else None

    # -- mechanics ------------------------------------------------------------------------------------------------
    def _arm_once(self, module: Any, method: str, around: Callable[..., Any]) -> None:
        """Hook one call of a method; the hook is gone before the method runs."""

        def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            undo()
            return around(inner, *args, **kwargs)

        undo = hook_instance(module, method, call)
        self._armed.append(undo)

    def _arm_configure_model(self, module: LightningModule) -> None:
        ready = False

        def set_up(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal ready
            ready = True  # the Trainer calls it after every callback's setup
            return inner(*args, **kwargs)

        def configure(inner: Callable[[], Any]) -> None:
            if not ready:  # called by another callback's setup: not every saver is registered yet
                inner()
                self._arm_once(module, "configure_model", configure)
                return
            check_methods([*self.methods, type(self.trainer.precision_plugin).__name__], self.strategy_kind)
            untested = [name for name in self.methods if cell(name, self.strategy_kind)[0] == "untested"]
            if untested:
                name = type(self.trainer.strategy).__name__
                self.report(", ".join(untested), f"not tested on {name}; compare losses")
            inner()
            self._run_pass(module)

        self._arm_once(module, "setup", set_up)
        self._arm_once(module, "configure_model", configure)

    def _run_pass(self, module: LightningModule) -> None:
        run = self._shared.get("transforms")
        if not isinstance(run, _TransformRun) or run.applied is not None:
            return
        run.applied = run.transform_pass.run(module)
        for transform, applied in run.applied:
            self.report(transform.name, describe(applied))


def describe(applied: Any) -> str:
    """Return the one line a transform is reported with."""
    if applied.bytes_before == applied.bytes_after:
        return str(applied.summary)
    return f"{applied.summary} ({format_bytes(applied.bytes_before)} -> {format_bytes(applied.bytes_after)})"


def hook_instance(target: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method on one instance with ``around(inner, *args, **kwargs)``.

    ``functools.wraps`` is left out on purpose: Lightning's ``is_overridden`` follows ``__wrapped__`` to the class
    and would then skip the hook.

    Returns:
        A function that takes the hook away; a second call does nothing.

    """
    had = target.__dict__.get(name)
    inner = getattr(target, name)

    def hook(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    target.__dict__[name] = hook

    def undo() -> None:
        if target.__dict__.get(name) is not hook:
            return
        if had is None:
            del target.__dict__[name]
        else:
            target.__dict__[name] = had

    return undo
