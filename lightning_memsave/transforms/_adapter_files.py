"""Read and write adapters: our checkpoints, and PEFT's folders."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsave._imports import require
from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError, NothingToTransformError
from lightning_memsave.transforms._adapter_config import adapted_layers, adapter_configs, config_problems
from lightning_memsave.transforms._checkpoint_state import (
    RECORD_KEY,
    canonical,
    is_adapter,
    key_problems,
    match_state,
    shape_problems,
)

__all__ = ["REBASED", "adapter_configs", "load_adapters", "read_checkpoint", "read_peft", "write_peft"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
# ways to start an adapter that also change the weights it lies on
REBASED = ("corda", "loftq", "olora", "pissa")


def load_adapters(module: nn.Module, path: str | Path) -> int:
    """Load trained adapters into a module that was prepared with ``apply``, in place.

    For inference, Fabric and plain torch, where no Trainer attaches the adapters (``load_from_checkpoint`` builds the
    module without them). The check is as strict as in training: every adapter must be there, nothing unknown, of the
    same shapes and settings, on the same base.

    Args:
        module: The module, or the network in it, with its adapters: ``apply(module, [LoRA(...)])``.
        path: A checkpoint written in training (a file, or a folder of shards), or a folder in PEFT's format with
            ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        How many tensors were loaded.

    Raises:
        CheckpointMismatchError: If the file is not of this module or not of this base; nothing was loaded then.
        ConfigurationError: If there is no checkpoint at ``path``.
        NothingToTransformError: If the module has no adapters and nothing else to load into.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from lightning_memsave import LoRA, apply, load_adapters
        >>> def build():
        ...     torch.manual_seed(0)
        ...     model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        ...     _ = apply(model, [LoRA(rank=2, modules="Linear")])
        ...     return model
        >>> from lightning_memsave.transforms._adapter_files import write_peft
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained = build()
        ...     notes = write_peft(trained, trained.state_dict(), folder)
        ...     load_adapters(build(), folder)
        4

    """
    path = Path(path)
    if not path.exists():
        raise ConfigurationError(
            f"load_adapters: there is nothing at {str(path)!r}. Give a checkpoint or a PEFT folder."
        )
    if path.is_dir() and not (path / ".metadata").is_file():
        return sum(_load_peft(module, folder) for folder in _peft_folders(path))
    checkpoint = _under_names_of(module, read_checkpoint(path))
    matched = match_state(module, checkpoint["state_dict"], checkpoint.get(RECORD_KEY))
    if not matched.state:
        raise NothingToTransformError(f"load_adapters: {str(path)!r} holds no tensor for {type(module).__name__}.")
    module.load_state_dict(matched.state, strict=False)
    return len(matched.state)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a Lightning checkpoint on the CPU: a file, or a folder of shards.

    Raises:
        CheckpointMismatchError: If it is no Lightning checkpoint, or holds Python objects that are not loaded unasked.

    """
    if path.is_dir():
        from lightning_memsave.transforms._sharded_checkpoint import read_folder

        return read_folder(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointMismatchError(
            f"{str(path)!r} cannot be read as tensors and plain data: {str(error).splitlines()[0]} If your own "
            "hyperparameters hold Python objects, store them as plain data (save_hyperparameters(ignore=[...]))."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointMismatchError(f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'.")
    return checkpoint


def _under_names_of(module: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Rename a checkpoint of a module around (or inside) this one, e.g. of the LightningModule that holds it."""
    here = {canonical(key) for key in module.state_dict()}
    saved = [key for key in checkpoint["state_dict"] if is_adapter(key)] or list(checkpoint["state_dict"])
    if not saved or any(key in here for key in saved):
        return checkpoint
    parts = saved[0].split(".")
    for prefix in (".".join(parts[:i]) + "." for i in range(1, len(parts))):
        if any(key.startswith(prefix) and key[len(prefix) :] in here for key in saved):
            return _renamed(checkpoint, remove=prefix)
    for name, _ in module.named_children():
        if any(f"{name}.{key}" in here for key in saved):
            return _renamed(checkpoint, add=f"{name}.")
    return checkpoint


def _renamed(checkpoint: dict[str, Any], *, remove: str = "", add: str = "") -> dict[str, Any]:
    """Exchange the prefix of every name in a checkpoint; what lies elsewhere belongs to another module."""

    def names(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {add + key[len(remove) :]: value for key, value in entries.items() if key.startswith(remove)}

    record = checkpoint.get(RECORD_KEY)
    if record is not None:
        adapters = names({f"{root}.".lstrip("."): config for root, config in record["adapters"].items()})
        parts = {key: names(record[key]) for key in ("base", "trainable")}
        record = {**record, **parts, "adapters": {key.rstrip("."): config for key, config in adapters.items()}}
    return {**checkpoint, "state_dict": names(checkpoint["state_dict"]), RECORD_KEY: record}


# -- PEFT's format ------------------------------------------------------------------------------------------------
def write_peft(module: nn.Module, state: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Write a module's adapters in PEFT's format.

    Args:
        module: The module that carries the adapters.
        state: Its whole tensors by name (under sharding they are gathered before).
        folder: Made if needed. With adapters in several models, each gets a folder of its name in it.

    Returns:
        Sentences about trained weights that the format cannot hold.

    Raises:
        ConfigurationError: If the adapters were started in a way that changed the base weights.

    """
    save_file = require("safetensors.torch", "Export to PEFT's format").save_file
    configs = adapter_configs(module)
    trained = {canonical(n) for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    for root, config in configs.items():
        if config["init_lora_weights"] in REBASED:
            raise ConfigurationError(
                f"Export to PEFT's format: adapters started with init_lora_weights={config['init_lora_weights']!r} lie "
                "on a changed base, and the file would be wrong on the original one. Start them in the usual way."
            )
        prefix = f"{root}." if root else ""
        keys = _peft_names(module, prefix)
        whole = _whole_modules(module, prefix, trained)
        tensors = {_PEFT_PREFIX + keys[key]: value for key, value in state.items() if key in keys}
        for name in whole:
            inside = [key for key in state if key.startswith(f"{prefix}{name}.")]
            tensors |= {f"{_PEFT_PREFIX}{key[len(prefix) :]}": state[key] for key in inside}
            trained -= set(inside)
        trained -= set(keys)
        target = Path(folder) / root if len(configs) > 1 else Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(plain, str(target / _WEIGHTS), metadata={"format": "pt"})
        text = json.dumps({**config, "modules_to_save": whole or None}, indent=2, sort_keys=True)
        (target / _CONFIG).write_text(text + "\n")
    if not trained:
        return []
    first = ", ".join(sorted(trained)[:3])
    return [
        f"{len(trained)} trained tensors have no place in PEFT's format and are in the checkpoint only (first: {first})"
    ]


def _peft_names(module: nn.Module, prefix: str) -> dict[str, str]:
    """Return module key -> name in PEFT's file for every adapter tensor below a prefix."""
    adapters = {layer.adapter for layer in adapted_layers(module)} or {"default"}
    found = {}
    for key in map(canonical, module.state_dict()):
        if key.startswith(prefix) and is_adapter(key):
            name = key[len(prefix) :]
            for adapter in adapters:
                name = re.sub(rf"(\.lora_\w+)\.{re.escape(adapter)}(?=\.|$)", r"\1", name)
            found[key] = re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", name)
    return found


def _whole_modules(module: nn.Module, prefix: str, trained: set[str]) -> list[str]:
    """Return the layers below a prefix that are trained in full beside the adapters, e.g. a new head."""
    found = []
    for name, layer in module.named_modules():
        own = [f"{name}.{key}" for key, _ in layer.named_parameters(recurse=False)]
        outside = (
            not is_adapter(name) and ".base_layer" not in name and "base_layer" not in dict(layer.named_children())
        )
        if own and outside and name.startswith(prefix) and all(canonical(key) in trained for key in own):
            found.append(canonical(name)[len(prefix) :])
    return found


def _peft_folders(path: Path) -> list[Path]:
    folders = [file.parent for file in sorted(path.rglob(_CONFIG))]
    if not folders:
        raise ConfigurationError(
            f"load_adapters: {str(path)!r} is neither a checkpoint nor a PEFT folder: there is no {_CONFIG} in it."
        )
    return folders


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a PEFT folder's configuration, and its tensors under names relative to the model."""
    load_file = require("safetensors.torch", "Reading PEFT's format").load_file
    if not (folder / _WEIGHTS).is_file():
        raise ConfigurationError(f"{str(folder)!r} has no {_WEIGHTS}; .bin files are pickles and are not read.")
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        raise CheckpointMismatchError(
            f"{str(folder)!r} holds {config.get('peft_type')} adapters, and only LORA (and its variants) can be loaded."
        )
    return config, {key.removeprefix(_PEFT_PREFIX): value for key, value in load_file(folder / _WEIGHTS).items()}


def _load_peft(module: nn.Module, folder: Path) -> int:
    config, tensors = read_peft(folder)
    configs = adapter_configs(module)
    if not configs:
        raise NothingToTransformError(
            f"load_adapters: {type(module).__name__} has no adapters to load into. Add them first: "
            f"apply(module, [LoRA(rank={config.get('r')}, alpha={config.get('lora_alpha')})])."
        )
    here = {canonical(key): key for key in module.state_dict()}
    best: tuple[int, str, dict[str, str]] = (-1, "", {})
    for root in configs:
        prefix = f"{root}." if root else ""
        names = {peft: key for key, peft in _peft_names(module, prefix).items()}
        found = {key: names.get(key, prefix + key) for key in tensors}
        best = max(best, (sum(key in here for key in found.values()), root, found), key=lambda item: item[0])
    _, root, found = best
    loaded = {found[key]: value for key, value in tensors.items()}
    expected = set(_peft_names(module, f"{root}." if root else ""))
    problems = key_problems(expected - set(loaded), set(loaded) - set(here), loaded, here)
    problems += shape_problems(loaded, module, here)
    problems += config_problems({root: config}, module)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointMismatchError(f"{str(folder)!r} does not fit this {type(module).__name__}:\n{listed}")
    module.load_state_dict({here[key]: value for key, value in loaded.items()}, strict=False)
    return len(loaded)
