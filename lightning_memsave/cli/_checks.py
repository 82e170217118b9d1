"""What this machine can use: each check returns a value and the reason, or what to do."""

from __future__ import annotations

import logging
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lightning_memsave import __version__
from lightning_memsave._imports import EXTRAS, is_available
from lightning_memsave.planner.catalog import CATALOG
from lightning_memsave.units import GIB, format_bytes

__all__ = ["Row", "all_rows", "missing_for"]

Status = Literal["ok", "info", "warn", "missing"]

# What a library is good for where no method of the catalog asks for it.
_PURPOSES = {
    "transformers": "Hugging Face models",
    "safetensors": "adapter files, memsave merge",
    "jsonargparse": "LightningCLI, typed YAML",
    "matplotlib": "MemoryProfiler's picture",
    "torchmetrics": "PeakMemory",
    "deepspeed": "the deepspeed strategies",
    "flash_attn": "FlashAttention in transformers",
    "torchao": "its own low-bit optimizers",
    "liger_kernel": "its fused kernels",
}
_LIBRARIES = ("bitsandbytes", "peft", *_PURPOSES)


@dataclass(frozen=True)
class Row:
    """One finding.

    Args:
        group: The heading it stands under.
        name: What was looked at.
        value: What was found.
        status: ``ok``, ``info`` (neither good nor bad), ``warn`` (works, but see the note) or ``missing``.
        note: The reason, or what to do.

    """

    group: str
    name: str
    value: str
    status: Status = "ok"
    note: str = ""


def all_rows() -> list[Row]:
    """Return every finding; imports torch and Lightning."""
    return [*_software(), *_accelerators(), *_number_formats(), *_libraries(), *_host()]


def missing_for(method: str) -> list[str]:
    """Return the pip lines of the optional libraries a method needs and this environment lacks."""
    required = next(row.requires for row in CATALOG if row.name == method)
    return [_pip_line(name) for name in required if not is_available(name)]


# -- software -----------------------------------------------------------------------------------------------------
def _software() -> list[Row]:
    group = "Software"
    rows = [
        Row(group, "lightning_memsave", __version__, *_installed_status()),
        Row(group, "Python", platform.python_version(), note=sys.executable),
    ]
    for name, need in (("torch", "2.8"), ("lightning", "2.5"), ("pytorch_lightning", "2.5")):
        version = _version(name)
        if version is None:
            other = name != "torch" and _version({"lightning": "pytorch_lightning"}.get(name, "lightning")) is not None
            note = "not needed: the other namespace is there" if other else f"pip install {name}"
            rows.append(Row(group, name, "not installed", "info" if other else "missing", note))
        elif _older(version, need):
            rows.append(Row(group, name, version, "warn", f'needs {need} or newer: pip install -U "{name}>={need}"'))
        else:
            rows.append(Row(group, name, version, note=_build() if name == "torch" else ""))
    return rows


def _installed_status() -> tuple[Status, str]:
    names = {entry.name for entry in metadata.entry_points(group="lightning.pytorch.callbacks_factory")}
    if "lightning_memsave" in names:
        value = os.environ.get("LIGHTNING_MEMSAVE")
        return ("ok", f"LIGHTNING_MEMSAVE={value}" if value else "LIGHTNING_MEMSAVE is not set")
    return ("warn", "imported but not installed, so LIGHTNING_MEMSAVE is not read: pip install lightning-memsave")


def _build() -> str:
    import torch

    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return "built for the CPU"


# -- accelerators -------------------------------------------------------------------------------------------------
def _accelerators() -> list[Row]:
    import torch

    group = "Accelerators"
    if not torch.accelerator.is_available():
        note = "every method also runs on the CPU, where it saves host memory"
        return [Row(group, "devices", "none", "info", note)]
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type != "cuda":
        return [Row(group, "devices", f"{torch.accelerator.device_count()} x {kind}", note="measured on CUDA and CPU")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        status: Status = "ok" if free > 0.9 * total else "warn"
        note = f"{format_bytes(free)} free" + ("" if status == "ok" else ": another process uses it")
        value = f"{properties.name}, {format_bytes(total)}, compute {properties.major}.{properties.minor}"
        rows.append(Row(group, f"cuda:{index}", value, status, note))
    return [*rows, _cuda_allocator(group)]


def _cuda_allocator(group: str) -> Row:
    import torch

    settings = {key: os.environ[key] for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if key in os.environ}
    value = ", ".join(f"{key}={text}" for key, text in settings.items()) or "default settings"
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        return Row(group, "allocator", f"{backend}, {value}", "info", "AllocatorSettings acts on the native one only")
    expandable = any("expandable_segments:True" in text for text in settings.values())
    note = "expandable segments are on" if expandable else "AllocatorSettings() turns expandable segments on"
    return Row(group, "allocator", f"{backend}, {value}", "ok" if expandable else "info", note)


# -- number formats -----------------------------------------------------------------------------------------------
def _number_formats() -> list[Row]:
    import torch

    group = "Number formats"
    if not torch.cuda.is_available():
        native = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
        note = "the CPU computes in bf16" if native else "right but slow: this CPU converts each value"
        return [
            Row(group, "bf16", "yes" if native else "emulated", "ok" if native else "info", note),
            Row(group, "fp8", "no", "info", "needs a GPU of compute 8.9 or newer"),
        ]
    major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    capability = major + minor / 10
    rows = []
    for name, need, fallback in (
        ("bf16", 8.0, 'write Trainer(precision="16-mixed") here'),
        ("int8", 7.5, "use WeightQuantization(kind='nf4') here"),
        ("fp8", 8.9, "use bf16 here"),
    ):
        fits = capability >= need or torch.version.hip is not None
        note = "" if fits else f"needs compute {need} or newer, the oldest GPU here has {capability}: {fallback}"
        rows.append(Row(group, name, "yes" if fits else "no", "ok" if fits else "info", note))
    return rows


# -- libraries ----------------------------------------------------------------------------------------------------
def _libraries() -> list[Row]:
    return [_bitsandbytes(row) if row.name == "bitsandbytes" else row for row in map(_library, _LIBRARIES)]


def _library(name: str) -> Row:
    group, purpose = "Optional libraries", _purpose(name)
    version = _version(name)
    if version is None:
        return Row(group, name, "not installed", "missing", f"{purpose}: {_pip_line(name)}")
    need = _floor(name)
    if need is not None and _older(version, need):
        return Row(group, name, version, "warn", f"needs {need} or newer: pip install -U {name}")
    return Row(group, name, version, note=purpose)


def _bitsandbytes(row: Row) -> Row:
    """Quantize a few values: the library imports without its compiled part and fails later."""
    if row.status not in ("ok", "warn"):
        return row
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Loading it logs advice about optional CPU kernels, which would stand in the middle of the table.
    logging.disable(logging.WARNING)
    try:
        import bitsandbytes.functional as functional

        functional.quantize_4bit(torch.ones(64, device=device, dtype=torch.float32), quant_type="nf4")
    except Exception as error:
        note = f"quantizing on {device} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return Row(row.group, row.name, row.value, "warn", note)
    finally:
        logging.disable(logging.NOTSET)
    return Row(row.group, row.name, row.value, row.status, f"{row.note}; works on {device}")


def _purpose(name: str) -> str:
    return ", ".join(row.name for row in CATALOG if name in row.requires) or _PURPOSES[name]


def _pip_line(name: str) -> str:
    return f'pip install "lightning-memsave[{EXTRAS[name]}]"'


def _floor(name: str) -> str | None:
    """Return the oldest version this package works with, from its own metadata."""
    from packaging.requirements import Requirement

    for line in metadata.requires("lightning-memsave") or []:
        requirement = Requirement(line)
        if requirement.name.replace("-", "_") == name and requirement.specifier:
            return next(iter(requirement.specifier)).version
    return None


def _version(name: str) -> str | None:
    if not is_available(name):
        return None
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown version"


def _older(version: str, need: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) < Version(need)
    except InvalidVersion:
        return False


# -- host ---------------------------------------------------------------------------------------------------------
def _host() -> list[Row]:
    group = "Host"
    total, available = _memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = "" if available is None else f"{format_bytes(available)} available; "
    rows = [Row(group, "memory", format_bytes(total), note=f"{free}{cores} cores")]
    return [*rows, *_shared_memory(group), _process_allocator(group)]


def _memory() -> tuple[int, int | None]:
    """Return total and, where the system says it, available bytes; inside a container, its limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return total, None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and current.is_file() and (text := limit.read_text().strip()) != "max":
        total, available = min(total, int(text)), min(available, int(text) - int(current.read_text()))
    return total, available


def _shared_memory(group: str) -> list[Row]:
    if not Path("/dev/shm").is_dir():
        return []
    stat = os.statvfs("/dev/shm")
    total, free = stat.f_frsize * stat.f_blocks, stat.f_frsize * stat.f_bavail
    small = total < GIB
    note = f"{format_bytes(free)} free; DataLoader workers use it" + (
        ": too small for most, start the container with --shm-size=8g or use num_workers=0" if small else ""
    )
    return [Row(group, "/dev/shm", format_bytes(total), "warn" if small else "ok", note)]


def _process_allocator(group: str) -> Row:
    """Say which malloc this process runs on: it decides how much freed memory stays in the process."""
    from lightning_memsave.memory.host import host_allocator

    name = host_allocator()
    if name is None:
        return Row(group, "process allocator", "unknown", "info", "this system does not say")
    if name == "glibc":
        note = "keeps freed blocks, so the process outgrows its tensors: LD_PRELOAD tcmalloc or jemalloc"
        return Row(group, "process allocator", name, "info", note)
    return Row(group, "process allocator", name, note="compare process sizes only under the same allocator")
