"""Named lists of callbacks for the common cases."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_memsave.errors import ConfigurationError

__all__ = ["PRESETS", "Preset", "find_methods", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named list of callbacks.

    Args:
        use_when: One sentence for the methods page.
        members: ``(public class, init arguments)``, in the order shown; the package decides the order of application.

    """

    use_when: str
    members: tuple[tuple[str, Mapping[str, Any]], ...]


_ALWAYS: tuple[tuple[str, Mapping[str, Any]], ...] = (("EarlyZeroGrad", {}), ("AllocatorSettings", {}))
_RECOMPUTE: tuple[str, Mapping[str, Any]] = ("ActivationCheckpointing", {})

PRESETS: dict[str, Preset] = {
    "basic": Preset(
        use_when="any training: the numbers stay bitwise the same",
        members=(*_ALWAYS, _RECOMPUTE),
    ),
    # No 8-bit optimizer here: adapters are below the sizes from which bitsandbytes quantizes or pages a state.
    "qlora": Preset(
        use_when="fine-tuning a model whose weights do not fit, with adapters on a 4-bit base",
        members=(*_ALWAYS, ("QLoRA", {}), _RECOMPUTE),
    ),
    "long_context": Preset(
        use_when="long sequences or large inputs: activations dominate",
        members=(*_ALWAYS, _RECOMPUTE),
    ),
    "full_finetune": Preset(
        use_when="training every weight: optimizer state and activations dominate",
        members=(*_ALWAYS, _RECOMPUTE, ("LowMemoryOptimizer", {"name": "adamw_8bit"})),
    ),
}


def preset(name: str) -> list[Any]:
    """Return fresh callbacks for a common case.

    ``EarlyZeroGrad`` and ``AllocatorSettings`` are in every preset: they change no number.

    Args:
        name: ``"basic"`` (exact numbers), ``"qlora"``, ``"long_context"`` or ``"full_finetune"``.

    Returns:
        A list to pass to ``Trainer(callbacks=...)``; add to it what you like.

    Raises:
        ConfigurationError: If there is no preset of that name; the message names the nearest.

    Example:
        >>> from lightning_memsave import preset
        >>> preset("basic")
        [EarlyZeroGrad(), AllocatorSettings(), ActivationCheckpointing()]

    """
    if name not in PRESETS:
        raise ConfigurationError(f"preset: asked for {name!r}, which is not a preset. {_describe_presets(name)}")
    import lightning_memsave

    return [getattr(lightning_memsave, member)(**arguments) for member, arguments in PRESETS[name].members]


def find_methods(value: str, *, subject: str) -> str | Path:
    """Return what a preset-or-YAML setting names: a preset's name, or the path of a file that exists.

    Args:
        value: A preset's name or a path.
        subject: Where the value comes from, for the message.

    Raises:
        ConfigurationError: If it is neither.

    Example:
        >>> find_methods("qlora", subject="LIGHTNING_MEMSAVE")
        'qlora'

    """
    name = value.strip()
    if name in PRESETS:
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"{subject}={value!r} is neither a preset nor a file in {os.getcwd()}. {_describe_presets(name)} "
            "A file is YAML with a list of callbacks. Unset it to attach nothing."
        )
    return path


def _describe_presets(asked: Any) -> str:
    near = difflib.get_close_matches(str(asked), PRESETS, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}The presets are {', '.join(map(repr, PRESETS))}."
