"""A list of callbacks in YAML, as LightningCLI writes it, read without a CLI."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_memsave._imports import is_available
from lightning_memsave.callbacks._lightning import NAMESPACES, Callback
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.planner.catalog import CATALOG

__all__ = ["read_callbacks"]

_LISTS = ("callbacks", "callbacks+")
_ENTRY_KEYS = ("class_path", "init_args")


def read_callbacks(path: Path, *, subject: str) -> list[Any]:
    """Return the callbacks of a YAML file.

    Args:
        path: Holds a list of ``{class_path, init_args}``, or that list as ``trainer.callbacks`` (``callbacks+`` too,
            so that an overlay for LightningCLI serves here).
        subject: Where the path comes from, for the message.

    Raises:
        ConfigurationError: If the file is not that, naming every wrong entry with the nearest right names.

    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{subject}: cannot be read as YAML: {error}") from error
    problems: list[str] = []
    callbacks = [_build(entry, f"callback {n}", problems) for n, entry in enumerate(_entries(content, subject), 1)]
    raise_problems(subject, problems)
    return callbacks


def _entries(content: Any, subject: str) -> list[Any]:
    entries = _trainer_callbacks(content, subject) if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not entries:
        raise ConfigurationError(
            f"{subject}: expected a list of {{class_path, init_args}}, found {type(entries).__name__} {entries!r}."
        )
    return entries


def _trainer_callbacks(content: Mapping[str, Any], subject: str) -> Any:
    trainer = content.get("trainer")
    settings: Mapping[str, Any] = trainer if isinstance(trainer, Mapping) else {}
    found = [key for key in _LISTS if key in settings]
    if len(found) != 1:
        raise ConfigurationError(
            f"{subject}: the file has {_listed(content)} and no list of callbacks. Write a list of "
            "{class_path, init_args}, or the same list as trainer.callbacks."
        )
    others = [*(key for key in content if key != "trainer"), *(f"trainer.{k}" for k in settings if k not in found)]
    if others:
        raise ConfigurationError(
            f"{subject}: only callbacks can be attached this way, and the file also sets {_listed(others)}. "
            "Move them to the project's own configuration."
        )
    return settings[found[0]]


def _build(entry: Any, where: str, problems: list[str]) -> Any:
    if isinstance(entry, str):
        entry = {"class_path": entry}
    if not isinstance(entry, Mapping) or "class_path" not in entry:
        problems.append(f"{where} is {entry!r}. Write class_path: lightning_memsave.NAME, and init_args under it.")
        return None
    unknown = [key for key in entry if key not in _ENTRY_KEYS]
    if unknown:
        problems.append(f"{where} has the keys {_listed(unknown)}; only class_path and init_args are allowed.")
        return None
    arguments = entry.get("init_args") or {}
    try:
        cls = _find(str(entry["class_path"]))
        _check_names(cls, arguments)
        return _instantiate(cls, arguments)
    except (TypeError, ValueError, ImportError) as error:
        problems.append(f"{where} ({entry['class_path']}): {error}")
        return None


def _find(class_path: str) -> type:
    module_name, _, name = class_path.rpartition(".")
    import lightning_memsave

    ours = [f"lightning_memsave.{n}" for n in lightning_memsave.__all__]
    try:
        cls = getattr(importlib.import_module(module_name), name) if module_name else None
    except (ImportError, AttributeError) as error:
        if class_path in ours:
            raise  # an import of ours failed: that is the error to show
        raise ValueError(f"it cannot be imported ({error}).{_nearest(class_path, ours)}") from error
    if cls is None:
        raise ValueError(f"it is not a dotted path.{_nearest(f'lightning_memsave.{name}', ours)}")
    bases = (Callback, *(namespace.Callback for namespace in NAMESPACES))
    if not (inspect.isclass(cls) and issubclass(cls, bases)):
        slot = next((m.slot for m in CATALOG if class_path == f"lightning_memsave.{m.name}"), None)
        hint = f" Move it to trainer.{slot} of the project's own configuration." if slot else _nearest(class_path, ours)
        raise ValueError(f"it is not a Lightning callback.{hint}")
    return cls


def _check_names(cls: type, arguments: Any) -> None:
    if not isinstance(arguments, Mapping):
        raise ValueError(f"init_args is {arguments!r}; write one 'name: value' a line.")
    parameters = inspect.signature(cls).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [str(name) for name in arguments if name not in parameters]
    if unknown:
        allowed = f"Its arguments are {', '.join(parameters)}." if parameters else "It takes no arguments."
        hints = "".join(_nearest(name, parameters) for name in unknown)
        raise ValueError(f"there is no argument {_listed(unknown)}.{hints} {allowed}")


def _instantiate(cls: type, arguments: Mapping[str, Any]) -> Any:
    """Make the callback; with jsonargparse, its types are checked and converted as LightningCLI does."""
    if not is_available("jsonargparse"):
        return cls(**arguments)
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "callback")
    try:
        parsed = parser.parse_object({"callback": dict(arguments)})
    except ArgumentError as error:
        # Its text names the argument as "callback.name", over several lines.
        raise ValueError(" ".join(str(error).replace('Parser key "callback.', 'argument "').split())) from error
    return parser.instantiate_classes(parsed).callback


def _nearest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names)
