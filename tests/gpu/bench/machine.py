"""What a result must say about where it was measured."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "commit", "hardware", "measured_on"]

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ("torch", "lightning", "pytorch-lightning", "transformers", "peft", "bitsandbytes", "accelerate")


def hardware(device: str) -> str:
    """Return the name of the accelerator, or of the processor for ``cpu``."""
    if device == "cpu":
        return f"CPU {platform.machine()}"
    import torch

    return torch.cuda.get_device_name(0)


def driver() -> str | None:
    """Return the version of the NVIDIA driver, or ``None`` where ``nvidia-smi`` does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str:
    """Return the commit of this checkout, with ``-dirty`` where tracked files differ; ``unknown`` outside git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of the libraries that matter, those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def measured_on(device: str) -> dict[str, Any]:
    """Return the part of a result that says where it was measured."""
    import torch

    import lightning_memsave

    about: dict[str, Any] = {
        "hardware": hardware(device),
        "package_version": lightning_memsave.__version__,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "versions": versions(),
    }
    if device != "cpu":
        about["device_bytes"] = torch.cuda.get_device_properties(0).total_memory
        about["cuda_version"], about["driver_version"] = torch.version.cuda, driver()
    return about
