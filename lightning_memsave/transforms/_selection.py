"""Which weights to quantize or adapt: linear layers, without heads, tied layers and what the user trains."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_memsave._match import match_modules
from lightning_memsave.errors import ConfigurationError, NothingToTransformError

__all__ = [
    "HEAD_NAMES",
    "MIN_ELEMENTS",
    "Selection",
    "check_placement",
    "head_layers",
    "is_adapter",
    "default_work_device",
    "kept_in_fp32",
    "linear_kind",
    "networks",
    "named_adapters",
    "named_selection",
    "select_linears",
    "shared_parameters",
    "under",
]

MIN_ELEMENTS = 4096

LinearKind = Literal["linear", "conv1d", "4bit", "8bit"]

HEAD_NAMES = frozenset(
    ("lm_head", "head", "heads", "classifier", "pre_classifier", "classification_head", "score", "cls", "qa_outputs")
    + ("embed_out", "output_head", "output_projection")
)


def linear_kind(module: nn.Module) -> LinearKind | None:
    """Return what kind of linear layer a module is, or ``None``.

    Only exact classes count. A subclass may read ``weight`` itself (the output projection of
    ``nn.MultiheadAttention`` never has its ``forward`` called), and so may a layer whose ``weight`` is computed
    (parametrizations, weight norm) or whose ``forward`` somebody else replaced.
    """
    cls = type(module)
    if cls.__module__.startswith("bitsandbytes."):
        return {"Linear4bit": "4bit", "LinearNF4": "4bit", "LinearFP4": "4bit", "Linear8bitLt": "8bit"}.get(
            cls.__name__
        )  # type: ignore[return-value]
    if cls is nn.Linear:
        kind: LinearKind = "linear"
    elif cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        kind = "conv1d"
    else:
        return None
    weight = module._parameters.get("weight")
    return kind if weight is not None and weight.is_floating_point() else None


def is_adapter(module: nn.Module) -> bool:
    """Return whether a module is an adapted layer of peft, without importing peft."""
    return any(c.__name__ == "BaseTunerLayer" and c.__module__.startswith("peft.") for c in type(module).__mro__)


def named_adapters(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the adapted layers below ``root``."""
    return [(name, module) for name, module in root.named_modules() if is_adapter(module)]


def under(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a module name is one of the prefixes or below one.

    Example:
        >>> under("net.head.fc", ["net.head"]), under("net.header", ["net.head"])
        (True, False)

    """
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def shared_parameters(root: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module holds (tied weights)."""
    holders: Counter[int] = Counter()
    for module in root.modules():
        holders.update({id(p) for p in module._parameters.values() if p is not None})
    return {key for key, count in holders.items() if count > 1}


def check_placement(root: nn.Module, *, subject: str) -> None:
    """Refuse models whose weights are not whole and real here, or are spread over devices.

    Raises:
        ConfigurationError: If weights are sharded, on the meta device, or spread over devices by a ``device_map``.

    """
    problems = []
    for name, parameter in root.named_parameters():
        if isinstance(parameter, DTensor):
            problems.append(
                f"{name} is sharded already (DTensor), and this needs whole weights. Take fully_shard out of your "
                "configure_model and let the strategy shard after this, or run on ddp."
            )
            break
    for name, parameter in root.named_parameters():
        if parameter.device.type == "meta":
            problems.append(f"{name} has no values yet (meta device). Load the weights before this runs.")
            break
    for name, module in root.named_modules():
        devices = {str(device) for device in (getattr(module, "hf_device_map", None) or {}).values()}
        if len(devices) > 1:
            problems.append(
                f"device_map spread {name or 'the model'} over {', '.join(sorted(devices))}; the Trainer needs one "
                'full copy per process. Load it with device_map={"": local_rank}, or without device_map.'
            )
    if problems:
        raise ConfigurationError(f"{subject}: " + " ".join(problems))


def _block_prefixes(root: nn.Module) -> list[str]:
    """Return the names of blocks: non-leaf children of one class that a container holds at least twice."""
    found = []
    for name, container in root.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        by_class = defaultdict(list)
        for child_name, child in container.named_children():
            if any(True for _ in child.children()):
                by_class[type(child)].append(f"{name}.{child_name}".lstrip("."))
        found += [child for names in by_class.values() if len(names) > 1 for child in names]
    return found


def networks(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the networks a module is made of: itself if it holds layers directly, else its children."""
    direct = any(linear_kind(child) for child in root.children())
    if direct or isinstance(root, (nn.Sequential, nn.ModuleList)):
        return [("", root)]
    return list(root.named_children())


def head_layers(root: nn.Module) -> set[str]:
    """Return the names of the linear layers that make the outputs: vocabulary, classes, regression.

    Four signs, outside repeated blocks: ``get_output_embeddings`` of a transformers model, a name such as
    ``lm_head``, ``classifier`` or ``score``, a weight tied with an embedding, or being the last linear layer of a
    network.
    """
    blocks = _block_prefixes(root)
    linears = {name: m for name, m in root.named_modules() if name and linear_kind(m)}
    outside = {name: m for name, m in linears.items() if not under(name, blocks)}
    found = {name for name in outside if HEAD_NAMES & set(name.split("."))}
    for module in root.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                output = getter()
            except (AttributeError, NotImplementedError):
                continue
            found |= {name for name, m in linears.items() if m is output}
    embeddings = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    found |= {name for name, m in linears.items() if id(m._parameters.get("weight")) in embeddings}
    for prefix, network in networks(root):
        names = [name for name in linears if not prefix or under(name, [prefix])]
        if names and names[-1] in outside and len(names) > 1 and any(True for _ in network.children()):
            found.add(names[-1])
    return found


def kept_in_fp32(root: nn.Module) -> set[str]:
    """Return the names of the modules that transformers models say must stay 32-bit; their code reads the dtype."""
    found = set()
    for prefix, model in root.named_modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            names = getattr(model, attribute, None)
            if isinstance(names, (list, tuple, set, frozenset)) and names:
                pattern = re.compile(rf"(^|\.)({'|'.join(re.escape(name) for name in sorted(names))})($|\.)")
                found |= {f"{prefix}.{n}".lstrip(".") for n, _ in model.named_modules() if pattern.search(n)}
    return found


@dataclass
class Selection:
    """The layers chosen, and how many were left out why.

    Args:
        names: Qualified names, in model order.
        left_out: Reason -> how many layers.
        heads: Names of the heads that were left out.

    """

    names: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    heads: list[str] = field(default_factory=list)

    def describe_left_out(self) -> str:
        """Return ``"1 head, 2 tied"``, or an empty string."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())


def select_linears(
    root: nn.Module,
    *,
    subject: str,
    kinds: Sequence[LinearKind],
    skip: Sequence[str] = (),
    train: Sequence[str] = (),
    quantize: bool = False,
) -> Selection:
    """Choose the linear layers that ``modules="auto"`` means.

    Args:
        root: Searched in ``named_modules`` order; itself never chosen.
        subject: The public class that asks.
        kinds: Kinds of linear layers that count.
        skip: Names of modules to leave out, with everything below them.
        train: Names of modules that stay trainable.
        quantize: Leave out what should not be quantized: weights below ``MIN_ELEMENTS`` values, those a transformers
            model keeps in fp32 (its code reads their dtype), and layers whose forward somebody replaced.

    Raises:
        NothingToTransformError: If nothing is left; says what was left out and why.

    """
    heads, tied, kept = head_layers(root), shared_parameters(root), kept_in_fp32(root)
    inside_adapters = [name for name, _ in named_adapters(root)]
    selection = Selection()
    total = 0
    for name, module in root.named_modules():
        if not name or linear_kind(module) not in kinds or under(name, inside_adapters):
            continue
        total += 1
        weight: Tensor = module.get_parameter("weight")
        reason = None
        if under(name, skip):
            reason = "skipped by name"
        elif under(name, train):
            reason = "trained"
        elif name in heads:
            reason = "head"
            selection.heads.append(name)
        elif id(weight) in tied:
            reason = "tied"
        elif quantize and name in kept:
            reason = "kept in fp32 by its model"
        elif quantize and weight.numel() < MIN_ELEMENTS:
            reason = f"below {MIN_ELEMENTS:,} values"
        elif quantize and "forward" in module.__dict__:
            reason = "with a replaced forward"
        if reason is None:
            selection.names.append(name)
        else:
            selection.left_out[reason] += 1
    if not selection.names:
        found = selection.describe_left_out() or "none at all"
        raise NothingToTransformError(
            f'{subject}: modules="auto" found no linear layer to work on among {total} in {type(root).__name__} '
            f'(left out: {found}). Name the layers: modules=["*.q_proj", ...].'
        )
    return selection


def named_selection(
    root: nn.Module, patterns: Sequence[str], *, subject: str, others: tuple[type[nn.Module], ...] = ()
) -> list[str]:
    """Return the names of the layers that patterns mean.

    A pattern means the linear layers it matches and those below the containers it matches; only where it matches no
    linear layer, it means the modules of the ``others`` classes that it matches.

    Raises:
        NothingToTransformError: If a pattern matches no module.
        ConfigurationError: If a pattern matches no layer that can be used.

    """
    names: dict[str, None] = {}
    for pattern in patterns:
        matched = match_modules(root, [pattern], subject=subject)
        prefixes = [name for name, _ in matched]
        inside = [(n, m) for n, m in root.named_modules() if n and under(n, prefixes) and not is_adapter(m)]
        found = [n for n, m in inside if linear_kind(m)] or [n for n, m in matched if isinstance(m, others)]
        if not found:
            classes = ", ".join(sorted({type(m).__name__ for _, m in matched}))
            raise ConfigurationError(
                f"{subject}: modules={pattern!r} matched {classes} and no layer this can work on. Name linear layers"
                + (f" (or {', '.join(sorted(c.__name__ for c in others))})" if others else "")
                + ', or write "auto". Subclasses of nn.Linear and layers with a computed weight do not count: their '
                "forward may read the weight in its own way."
            )
        names |= dict.fromkeys(found)
    return list(names)


def default_work_device(weight: Tensor) -> torch.device:
    """Return where to compute on a weight: the default device if that is an accelerator, else where the weight is."""
    default = torch.get_default_device()
    return weight.device if default.type in ("cpu", "meta") else default
