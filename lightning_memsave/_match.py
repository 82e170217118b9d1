"""Select modules by name or class: the one meaning of every ``modules`` argument."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_memsave.errors import ConfigurationError, NothingToTransformError

__all__ = ["Patterns", "as_patterns", "match_modules", "matches"]

Patterns = str | Sequence[str]


def as_patterns(modules: object, *, subject: str) -> tuple[str, ...]:
    """Return the patterns of a ``modules`` argument as a tuple.

    Args:
        modules: ``"auto"``, one pattern or several.
        subject: The public class that took the argument, for the message.

    Raises:
        ConfigurationError: If it is empty or not made of strings.

    Example:
        >>> as_patterns("*.mlp", subject="LoRA")
        ('*.mlp',)

    """
    given = [modules] if isinstance(modules, str) else list(modules) if isinstance(modules, (Sequence, set)) else []
    patterns = tuple(p for p in given if isinstance(p, str) and p)
    if not patterns or len(patterns) != len(given):
        raise ConfigurationError(
            f"{subject}: modules={modules!r} selects nothing. "
            'Write "auto", a glob over module names ("net.blocks.*") or a class name ("LlamaDecoderLayer").'
        )
    return patterns


def matches(name: str, module: nn.Module, patterns: Iterable[str]) -> bool:
    """Return whether a module is selected: a glob on its qualified name, or one of its class names.

    Example:
        >>> matches("net.0", nn.Linear(1, 1), ["net.*"]), matches("net.0", nn.Linear(1, 1), ["Linear"])
        (True, True)

    """
    classes = {cls.__name__ for cls in type(module).__mro__ if cls not in (object, nn.Module)}
    return any(pattern in classes or fnmatchcase(name, pattern) for pattern in patterns)


def match_modules(root: nn.Module, patterns: Sequence[str], *, subject: str) -> list[tuple[str, nn.Module]]:
    """Return the ``(qualified name, module)`` pairs below ``root`` that the patterns select, each module once.

    Args:
        root: Searched in ``named_modules`` order; ``root`` itself is never selected.
        patterns: Globs or class names.
        subject: The public class that asks, for the message.

    Raises:
        NothingToTransformError: If one pattern selects nothing; names the nearest modules and classes.

    """
    named = [(name, module) for name, module in root.named_modules() if name]
    for pattern in patterns:
        if not any(matches(name, module, (pattern,)) for name, module in named):
            raise NothingToTransformError(_no_match(subject, pattern, named))
    return [(name, module) for name, module in named if matches(name, module, patterns)]


def _no_match(subject: str, pattern: str, named: list[tuple[str, nn.Module]]) -> str:
    candidates = sorted({name for name, _ in named} | {type(module).__name__ for _, module in named})
    near = difflib.get_close_matches(pattern.strip("*."), candidates, n=5, cutoff=0.4) or candidates[:5]
    found = ", ".join(repr(n) for n in near) if near else "none: the module has no submodules"
    return (
        f"{subject}: modules={pattern!r} matched none of the {len(named)} submodules. "
        f'Nearest names and classes: {found}. Write a glob over qualified names ("net.blocks.*"), '
        'a class name, or "auto".'
    )
