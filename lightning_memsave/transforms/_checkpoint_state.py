"""What a checkpoint of a partly frozen module holds, and whether one fits a module.

A checkpoint keeps the trainable parameters, every persistent buffer, whatever else a module puts into its state dict,
and frozen parameters that moved since the run began (a momentum teacher). It leaves out the frozen parameters and the
quantization state that belongs to them; a record of plain data says what they were.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.transforms._adapter_config import adapter_configs, config_problems
from lightning_memsave.transforms._pass import applied_record
from lightning_memsave.transforms.fingerprint import compare, content_hash, fingerprint, sample_hash, weight_kind

__all__ = [
    "FORMAT",
    "RECORD_KEY",
    "Frozen",
    "Matched",
    "canonical",
    "filter_state",
    "is_adapter",
    "kept_bytes",
    "key_problems",
    "make_record",
    "match_state",
    "replaced_base",
    "shape_problems",
]

RECORD_KEY = "memsave"
FORMAT = 1
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")
_ADAPTER = re.compile(r"(^|\.)lora_\w+(\.|$)")


def canonical(name: str) -> str:
    """Return a parameter's name without the wrappers of compile, checkpointing and FSDP.

    Example:
        >>> canonical("net._orig_mod.0.weight")
        'net.0.weight'

    """
    return _WRAPPERS.sub("", name).removeprefix(".")


def named_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield every name of every parameter; a tied one has several."""
    return module.named_parameters(remove_duplicate=False)


def belongs_to(name: str, weight: nn.Parameter, keys: Collection[str]) -> set[str]:
    """Return the state-dict keys of a parameter and of its quantization state."""
    found = {name} | {key for key in keys if key.startswith(f"{name}.")}
    if hasattr(weight, "SCB"):
        prefix = name.rpartition(".")[0]
        found |= {f"{prefix}.SCB".lstrip("."), f"{prefix}.weight_format".lstrip(".")}
    return found & set(keys)


class Frozen:
    """Watch the frozen parameters of one module: which moved since the start, and what the others hold.

    Which parameters are frozen is looked up at every call, so that a part may be unfrozen mid-training. The content
    of the frozen weights is read once in full (at the first save) and at each save in part, to notice moves.
    """

    def __init__(self, module: nn.Module) -> None:
        self.moved: set[str] = set()
        self._samples = {canonical(n): sample_hash(p) for n, p in named_parameters(module) if not p.requires_grad}
        self._contents: dict[str, str | None] = {}

    def update(self, module: nn.Module) -> set[str]:
        """Return the frozen parameters that hold something else than at the start (or than when they were frozen)."""
        for name, weight in named_parameters(module):
            key = canonical(name)
            if not weight.requires_grad and self._samples.get(key) != sample_hash(weight):
                # Unknown at the start means it was trained and is frozen now: the base does not hold its value.
                self.moved.add(key)
        return self.moved

    def fingerprints(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the fingerprint of every frozen parameter that did not move; on sharded weights call on all ranks."""
        found: dict[str, dict[str, Any]] = {}
        names: dict[int, str] = {}
        for name, weight in named_parameters(module):
            key = canonical(name)
            first = names.setdefault(id(weight), key)  # a tied weight is read once
            if weight.requires_grad or key in self.moved:
                continue
            if first not in self._contents:
                self._contents[first] = content_hash(weight)
            found[key] = fingerprint(weight, self._contents[first])
        return found


def filter_state(module: nn.Module, state: Mapping[str, Any], moved: Collection[str] = ()) -> dict[str, Any]:
    """Return the part of a module's state dict that a checkpoint keeps, under canonical names.

    Args:
        module: Whose state it is.
        state: ``module.state_dict()``, or what a strategy made of it; tensors are not copied.
        moved: Canonical names of frozen parameters to keep.

    """
    dropped: set[str] = set()
    named = {canonical(key): key for key in state}
    for name, weight in named_parameters(module):
        key = canonical(name)
        if not weight.requires_grad and key not in moved:
            dropped |= belongs_to(key, weight, named)
    return {key: state[actual] for key, actual in named.items() if key not in dropped}


def make_record(module: nn.Module, frozen: Frozen) -> dict[str, Any]:
    """Return the plain data a checkpoint keeps about the module it belongs to.

    Returns:
        ``format``; ``transforms`` (what was applied, as text); ``trainable`` (name -> shape); ``moved`` (frozen
        parameters that are in the checkpoint all the same), ``base`` (frozen name -> fingerprint) and ``adapters``
        (PEFT's configuration of each adapted model).

    """
    return {
        "format": FORMAT,
        "transforms": [dict(entry) for entry in applied_record(module)],
        "trainable": {canonical(n): list(p.shape) for n, p in named_parameters(module) if p.requires_grad},
        "moved": sorted(frozen.moved),
        "base": frozen.fingerprints(module),
        "adapters": adapter_configs(module),
    }


# -- loading ------------------------------------------------------------------------------------------------------
@dataclass
class Matched:
    """What of a checkpoint to load into a module.

    Args:
        state: State dict under the module's own names; load it with ``strict=False``.
        notes: Sentences to show: what could not be compared, what was mapped.

    """

    state: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def match_state(
    module: nn.Module, saved: Mapping[str, Any], record: Mapping[str, Any] | None, *, base_alone: bool = False
) -> Matched:
    """Check that a checkpoint is one of this module and return what to load.

    Args:
        module: The module as it is built, with its adapters.
        saved: The checkpoint's ``state_dict``.
        record: What ``make_record`` left in the checkpoint, or ``None`` for a plain one, which must be complete.
        base_alone: Accept a plain checkpoint of the model without adapters: its weights go below the adapters, which
            keep their values.

    Raises:
        CheckpointMismatchError: If keys are missing, unknown, renamed or of another shape, or the base is another
            one; the message lists all of it.

    """
    _check_format(record)
    here = {canonical(key): key for key in module.state_dict()}
    weights = {canonical(n): p for n, p in named_parameters(module)}
    loaded = {canonical(key): value for key, value in saved.items()}
    problems: list[str] = []
    notes: list[str] = []
    if record is None:
        expected = set(here)
        if any(is_adapter(key) for key in here) and not any(is_adapter(key) for key in loaded):
            loaded = _below_adapters(loaded, here)
            if base_alone:
                expected = {key for key in here if not is_adapter(key)}
                notes.append("the checkpoint has no adapters: its weights went below the adapters, which start fresh")
        problems += _settle_quantized(loaded, expected, weights, here)
    else:
        expected = set(filter_state(module, here))
        base = record["base"]
        expected -= {
            key for key in expected - set(loaded) if key in base and compare(base[key], weights[key]) == "equal"
        }
        problems += config_problems(record["adapters"], module)
        base_problems, base_notes = _base_problems(base, weights, loaded)
        problems += base_problems
        notes += base_notes
    held = {id(weights[key]) for key in loaded if key in weights}
    missing = {key for key in expected - set(loaded) if key not in weights or id(weights[key]) not in held}
    problems += key_problems(missing, set(loaded) - set(here), loaded, here)
    problems += shape_problems(loaded, module, here)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointMismatchError(f"The checkpoint does not fit this {type(module).__name__}:\n{listed}")
    return Matched({here[key]: value for key, value in loaded.items()}, notes)


def _check_format(record: Mapping[str, Any] | None) -> None:
    if record is not None and record.get("format", 0) > FORMAT:
        raise CheckpointMismatchError(
            f"The checkpoint has format {record['format']}, and this version of lightning_memsave reads up to "
            f"{FORMAT}. Update lightning_memsave."
        )


def is_adapter(key: str) -> bool:
    """Return whether a state-dict key belongs to an adapter rather than to the layer it adapts.

    Example:
        >>> is_adapter("net.q.lora_A.default.weight"), is_adapter("net.q.base_layer.weight")
        (True, False)

    """
    return _ADAPTER.search(key) is not None


def _below_adapters(loaded: dict[str, Any], here: Mapping[str, str]) -> dict[str, Any]:
    """Give the keys of a model without adapters the names they have below the adapters."""
    below = {key.replace(".base_layer.", "."): key for key in here if ".base_layer." in key}
    return {below.get(key, key): value for key, value in loaded.items()}


def _settle_quantized(
    loaded: dict[str, Any], expected: set[str], weights: Mapping[str, nn.Parameter], here: Mapping[str, str]
) -> list[str]:
    """Take quantized weights out of a plain checkpoint after checking that the module holds the same codes."""
    different = []
    for name, weight in weights.items():
        if not hasattr(weight, "quant_state") and not hasattr(weight, "SCB"):
            continue
        value = loaded.get(name)
        expected -= belongs_to(name, weight, here)
        for key in belongs_to(name, weight, loaded):
            del loaded[key]
        if (
            not isinstance(value, Tensor)
            or value.dtype != weight.dtype
            or not torch.equal(value.to(weight.device), weight)
        ):
            different.append(name)
    if not different:
        return []
    return [
        f"{_count(different, 'quantized weight')} cannot be restored from it: a plain checkpoint loads before "
        "quantization only. Load it into the module first (load_from_checkpoint), then pass the module to fit."
    ]


def _base_problems(
    base: Mapping[str, dict[str, Any]], weights: Mapping[str, nn.Parameter], loaded: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Compare the frozen weights of a module with those a checkpoint was saved on."""
    flat = {key.replace(".base_layer.", "."): weight for key, weight in weights.items()}
    saved = {key.replace(".base_layer.", "."): entry for key, entry in base.items()}
    found: dict[str, list[str]] = {"equal": [], "shape": [], "content": [], "kind": [], "missing": []}
    for name, entry in saved.items():
        found[compare(entry, flat[name]) if name in flat else "missing"].append(name)
    known = set(saved) | {key.replace(".base_layer.", ".") for key in loaded}
    extra = [name for name, weight in flat.items() if not weight.requires_grad and name not in known]
    problems = []
    if found["missing"]:
        problems.append(
            f"it was saved on another base: {_count(found['missing'], 'frozen weight')} not in this module."
        )
    if extra:
        problems.append(f"it was saved on another base, which lacks {_count(extra, 'frozen weight')} of this module.")
    if found["shape"]:
        name = found["shape"][0]
        shapes = f"{saved[name]['shape']} there, {list(flat[name].shape)} here"
        problems.append(
            f"it was saved on another base: {_count(found['shape'], 'frozen weight')} of other shape ({shapes})."
        )
    if found["content"]:
        problems.append(
            f"it was saved on another base: {_count(found['content'], 'frozen weight')} of other content. Build the "
            "module on the base that was used in training (same pretrained weights, or same seed)."
        )
    notes = []
    if found["kind"]:
        name = found["kind"][0]
        there, now = (
            f"{saved[name]['kind']} ({saved[name]['device']})",
            f"{weight_kind(flat[name])} ({flat[name].device.type})",
        )
        notes.append(
            f"{_count(found['kind'], 'frozen weight')} stored as {there} there, as {now} here: only their shapes were "
            "compared"
        )
    return problems, notes


def key_problems(missing: set[str], unknown: set[str], loaded: Mapping[str, Any], here: Mapping[str, str]) -> list[str]:
    problems = []
    if unknown and all(is_adapter(k) for k in unknown) and not any(is_adapter(k) for k in here):
        return [
            f"it holds adapters ({_count(unknown, 'tensor')}), and the module has none. Add LoRA or QLoRA with the "
            "settings of the run that saved it."
        ]
    if missing and all(is_adapter(k) for k in missing) and not any(is_adapter(k) for k in loaded):
        return [
            f"it holds no adapters, and the module has some ({_count(missing, 'tensor')} missing). To adapt a model "
            "trained without adapters, load it first (load_from_checkpoint), then pass the module to fit."
        ]
    if missing:
        problems.append(f"it lacks {_count(missing, 'tensor')} that the module needs.")
    if unknown:
        problems.append(f"it holds {_count(unknown, 'tensor')} that the module does not have.")
    if missing and len(missing) == len(unknown):
        problems.append("as many are missing as are unknown: were parts of the module renamed since it was saved?")
    return problems


def shape_problems(loaded: Mapping[str, Any], module: nn.Module, here: Mapping[str, str]) -> list[str]:
    state = module.state_dict()
    wrong = {}
    for key, value in loaded.items():
        mine = state.get(here.get(key, key))
        if not isinstance(value, Tensor) or not isinstance(mine, Tensor) or is_lazy(mine):
            continue
        if value.shape != mine.shape:
            wrong[key] = (list(value.shape), list(mine.shape))
    if not wrong:
        return []
    ranks = {(s[0], m[0]) for key, (s, m) in wrong.items() if ".lora_A." in key and s[1:] == m[1:]}
    if len(ranks) == 1:
        rank, mine = next(iter(ranks))
        return [f"it was saved with rank {rank}, and the module has rank {mine}. Write rank={rank}."]
    there, now = wrong[min(wrong)]
    return [f"{_count(wrong, 'tensor')} of other shape ({there} there, {now} here)."]


def _count(names: Collection[str], noun: str) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} (first: {first})"


def kept_bytes(module: nn.Module) -> tuple[int, int]:
    """Return the bytes of a module's parameters that are trainable, and of all; quantization state is not counted."""
    sizes = [(p.requires_grad, p.numel() * p.element_size()) for p in module.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


def replaced_base(module: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """Return the frozen parameters that loading ``state`` would change: they must stay in later checkpoints."""
    found = set()
    for name, weight in named_parameters(module):
        value = state.get(name)
        if weight.requires_grad or not isinstance(value, Tensor):
            continue
        unreadable = "meta" in (value.device.type, weight.device.type) or value.dtype != weight.dtype
        if unreadable or not torch.equal(value.to(weight.device), weight):
            found.add(canonical(name))
    return found
