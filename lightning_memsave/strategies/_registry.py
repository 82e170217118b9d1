"""The strategy names of this package: ``Trainer(strategy="memsave_ddp")``.

Lightning validates a name before it reads anybody's entry points, so somebody must have put it into its registry: this
package does when anything of it that needs Lightning is imported, and ``memsave run`` does for the script it runs.
Nothing of torch or Lightning is imported here; a strategy's own module is imported when its name is used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["NAMES", "Named", "as_memsave_run", "register_names", "register_on_import"]

_REGISTRIES = ("lightning.pytorch.strategies", "pytorch_lightning.strategies")


class Named(NamedTuple):
    """One registered name: the public class, its arguments and a line about it."""

    strategy: str
    arguments: Mapping[str, Any]
    about: str


NAMES: dict[str, Named] = {
    "memsave_ddp": Named("BlockDDPStrategy", {}, "data parallel, gradients averaged block by block inside backward"),
}


class _Factory:
    """What Lightning calls to make the strategy."""

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy

    def __call__(self, **arguments: Any) -> Any:
        return getattr(importlib.import_module("lightning_memsave"), self.strategy)(**arguments)


def register_names(registry: Any) -> None:
    """Put the names of this package into a ``StrategyRegistry``; a second call changes nothing."""
    for name, entry in NAMES.items():
        registry.register(
            name, _Factory(entry.strategy), description=entry.about, override=True, **dict(entry.arguments)
        )


_relaunch: list[str] = []  # the words after "memsave" that run this process's script, under `memsave run`


def register_on_import(relaunch: Sequence[str] = ()) -> None:
    """Register the names as soon as a namespace's strategies are imported, now or later.

    For ``memsave run``, which imports neither torch nor Lightning before the script does.

    Args:
        relaunch: The words after ``memsave`` with which another process would run the same script.

    """
    _relaunch[:] = relaunch
    for path in _REGISTRIES:
        if path in sys.modules:
            register_names(sys.modules[path].StrategyRegistry)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextmanager
def as_memsave_run() -> Iterator[None]:
    """Let Lightning's launcher start the other processes through ``memsave run`` if this one runs under it.

    It starts ``sys.argv`` anew, with ``-m`` if the main module has a spec: a script that knows the names of this
    package through ``memsave run`` only would not find them there.
    """
    if not _relaunch:
        yield
        return
    main = sys.modules["__main__"]
    argv, spec = sys.argv, main.__spec__
    sys.argv = [argv[0], *_relaunch, *argv[1:]]
    main.__spec__ = importlib.machinery.ModuleSpec("lightning_memsave", None)
    try:
        yield
    finally:
        sys.argv, main.__spec__ = argv, spec


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: adds one call to the import of the two modules that hold a registry."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then the registration."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.inner  # type: ignore[union-attr]
        register_names(module.StrategyRegistry)
