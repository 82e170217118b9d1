"""Optional libraries: imported where they are used, with one clear error when they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from lightning_memsave.errors import MissingDependencyError

__all__ = ["EXTRAS", "is_available", "require"]

# import name -> the extra of this package that installs it
EXTRAS = {
    "bitsandbytes": "bnb",
    "datasets": "data",
    "deepspeed": "deepspeed",
    "flash_attn": "flash",
    "gguf": "demo",
    "jsonargparse": "cli",
    "liger_kernel": "liger",
    "matplotlib": "plot",
    "peft": "peft",
    "safetensors": "peft",
    "torchao": "torchao",
    "torchmetrics": "metrics",
    "transformers": "hf",
}


def is_available(name: str) -> bool:
    """Return whether the top-level module ``name`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def require(name: str, purpose: str) -> ModuleType:
    """Import and return an optional library.

    Args:
        name: Import name, e.g. ``"bitsandbytes"`` or ``"peft.tuners.lora"``.
        purpose: What needs it, as the subject of the message, e.g. ``"LowMemoryOptimizer('adamw_8bit')"``.

    Raises:
        MissingDependencyError: If it is not installed, or fails to import; the message holds the pip line.

    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.split(".")[0]
        extra = EXTRAS.get(top)
        line = f'pip install "lightning-memsave[{extra}]"' if extra else f"pip install {top}"
        found = "it is not installed" if not is_available(top) else f"importing it failed: {error}"
        raise MissingDependencyError(f"{purpose} needs {top}, and {found}. Install it: {line}") from error
