"""Every error this package raises on purpose.

::

    MemsaveError
    |-- ConfigurationError        (also a ValueError)   an argument or a setting is wrong
    |   `-- IncompatibleMethodsError                    two methods cannot run together
    |-- MissingDependencyError    (also an ImportError) an optional library is not installed
    |-- NothingToTransformError                         a selection matched no module
    `-- CheckpointMismatchError                         a checkpoint is not of this model

A message says what was asked, what was found and what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CheckpointMismatchError",
    "ConfigurationError",
    "IncompatibleMethodsError",
    "MemsaveError",
    "MissingDependencyError",
    "NothingToTransformError",
    "raise_problems",
]


class MemsaveError(Exception):
    """Base class of every error raised on purpose by this package."""


class ConfigurationError(MemsaveError, ValueError):
    """An argument or a setting is wrong; the message lists every problem found."""


class IncompatibleMethodsError(ConfigurationError):
    """Two methods, or a method and a strategy, cannot run together."""


class MissingDependencyError(MemsaveError, ImportError):
    """An optional library is needed and not installed; the message holds the pip line."""


class NothingToTransformError(MemsaveError):
    """A selection of modules matched nothing, so the method would do nothing."""


class CheckpointMismatchError(MemsaveError):
    """A checkpoint lacks, adds or reshapes what this model needs."""


def raise_problems(subject: str, problems: Sequence[str]) -> None:
    """Raise one ``ConfigurationError`` that lists all problems, or return if there are none.

    Args:
        subject: What was configured, e.g. ``"LoRA"``.
        problems: One sentence each: what was asked, what is allowed.

    Raises:
        ConfigurationError: If ``problems`` is not empty.

    Example:
        >>> raise_problems("LoRA", [])

    """
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigurationError(f"{subject}:\n{listed}" if len(problems) > 1 else f"{subject}: {problems[0]}")
