"""Find the output heads of a model, and say how the logits of one are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_memsave.errors import NothingToTransformError
from lightning_memsave.transforms._bnb_layers import check_quantized, dequantized_weight
from lightning_memsave.transforms._deferred_projection import Head, LinearHead, ModuleHead
from lightning_memsave.transforms._frozen import forward_frozen_linear
from lightning_memsave.transforms._patch import InstanceForward
from lightning_memsave.transforms._selection import HEAD_NAMES, is_adapter, linear_kind, networks, under
from lightning_memsave.transforms.blocks import find_blocks

__all__ = ["adapter_state", "describe_head", "find_heads", "in_adapter_state", "num_classes", "why_not_deferred"]

# A head with fewer classes, and no vocabulary of that size in the model, makes logits that are not worth cutting.
_MIN_CLASSES = 512
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter")


def num_classes(module: nn.Module) -> int | None:
    """Return how many logits a layer makes for a row, or ``None`` if it is no layer whose logits can be cut."""
    if is_adapter(module):
        base = getattr(module, "base_layer", None)
        return num_classes(base) if isinstance(base, nn.Module) else None
    own_forward = type(module).forward is not nn.Linear.forward
    if isinstance(module, nn.Linear) and (not own_forward or linear_kind(module) in ("4bit", "8bit")):
        return int(module.out_features)
    return None


def find_heads(root: nn.Module, *, subject: str) -> list[tuple[str, nn.Module]]:
    """Return the layers that make logits over a vocabulary, or over many classes.

    Args:
        root: Any module.
        subject: The public class that asks.

    Returns:
        ``(qualified name, layer)``; an adapted layer stands for the layer it wraps.

    Raises:
        NothingToTransformError: If there is none; names the largest linear layers.

    """
    layers = dict(_outermost_layers(root))
    vocabularies = {m.num_embeddings for m in root.modules() if isinstance(m, nn.Embedding)}
    blocks = [block.name for block in find_blocks(root)]
    outside = {name: m for name, m in layers.items() if not under(name, blocks)}
    sure = _output_embeddings(root, layers) | _tied(root, layers)
    likely = {name for name in outside if HEAD_NAMES & set(name.split("."))} | _last_of_networks(root, outside)
    sizes = {name: num_classes(layers[name]) or 0 for name in likely}
    large = {name for name, size in sizes.items() if size in vocabularies or size >= _MIN_CLASSES}
    found = [(name, module) for name, module in layers.items() if name in sure | large]
    if not found:
        raise NothingToTransformError(_nothing(subject, root, layers))
    return found


def _outermost_layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: list[str] = []
    for name, module in root.named_modules():
        if name and num_classes(module) is not None and not under(name, inside):
            inside += [name] if is_adapter(module) else []
            yield name, module


def _output_embeddings(root: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    found: set[str] = set()
    for module in root.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        try:
            output = getter()
        except (AttributeError, NotImplementedError):
            continue
        # A wrapper of peft's (modules_to_save) holds the layer that is called.
        inner = {id(m) for m in output.modules()} if isinstance(output, nn.Module) else set()
        found |= {name for name, layer in layers.items() if id(layer) in inner}
    return found


def _tied(root: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    tables = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    return {name for name, m in layers.items() if any(id(p) in tables for p in m.parameters())}


def _last_of_networks(root: nn.Module, outside: dict[str, nn.Module]) -> set[str]:
    found = set()
    for prefix, _ in networks(root):
        names = [name for name in outside if not prefix or under(name, [prefix])]
        found.update(names[-1:])
    return found


def _nothing(subject: str, root: nn.Module, layers: dict[str, nn.Module]) -> str:
    sizes = sorted(((num_classes(m) or 0, name) for name, m in layers.items()), reverse=True)[:4]
    listed = ", ".join(f"{name} ({size:,} outputs)" for size, name in sizes) or "none"
    return (
        f"{subject}: found no output head in {type(root).__name__}: no get_output_embeddings(), no linear layer tied "
        f"with an embedding, none outside the repeated blocks that ends a network with {_MIN_CLASSES} outputs or more, "
        f"or as many as an embedding has rows. Largest linear layers: {listed}. Where forward makes the logits itself "
        f"(hidden @ embedding.weight.T), call chunked_cross_entropy there; else leave {subject} out."
    )


# -- how the logits of one are made -----------------------------------------------------------------------------------
def describe_head(patch: InstanceForward, dtype: torch.dtype) -> Head:
    """Return how a head makes its logits now: from its weight where that is all it uses, else by calling it.

    Args:
        patch: The head's patched forward.
        dtype: Dtype of the products.

    """
    module: Any = patch.module
    classes = num_classes(module)
    assert classes is not None
    inner = _inside_of_tiles(patch.inner)
    patched = inner if isinstance(inner, InstanceForward) else None
    kind = linear_kind(module)
    if kind in ("4bit", "8bit"):
        ours = patched is not None and patched.call.__module__ == dequantized_weight.__module__
        asked = patched.options.get("compute_dtype") if patched is not None else None
        if ours and asked in (None, dtype) and check_quantized(module) is None:
            return LinearHead(None, module.bias, classes, partial(_unpacked, module))
    elif not is_adapter(module) and _is_plain(inner) and type(weight := module.weight) in (Tensor, nn.Parameter):
        return LinearHead(weight, module.bias, classes)
    return ModuleHead(inner, [p for p in module.parameters() if p.requires_grad], classes)


def _inside_of_tiles(forward: Any) -> Any:
    """Return the forward that a tiled one runs in tiles: chunks are tiles already."""
    while isinstance(forward, InstanceForward) and (not forward.active or forward.call.__module__.endswith(".tiling")):
        forward = forward.inner
    return forward


def _is_plain(forward: Any) -> bool:
    """Return whether a forward is that of ``nn.Linear``, or ours that casts a frozen weight."""
    if isinstance(forward, InstanceForward):
        return forward.call is forward_frozen_linear
    return getattr(forward, "__func__", None) is nn.Linear.forward


def _unpacked(module: nn.Module, dtype: torch.dtype) -> Tensor:
    return dequantized_weight(module, dtype)


def why_not_deferred(module: nn.Module) -> str:
    """Return why the logits of a head have to be made at once, or ``""``."""
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in module.modules()):
        return "the head draws random numbers (dropout), which a second call would not repeat"
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            return "the head's weight is split over devices (DTensor) while it runs"
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed takes the head's weight away after its forward"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    foreign = [hook for held in hooks for hook in held.values() if not from_fsdp(hook)]
    if foreign and is_sharded(module):
        return "the head has hooks of its own, and FSDP2 shards it by itself"
    return ""


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 gathers a module by itself, without importing FSDP."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def from_fsdp(hook: Callable[..., Any]) -> bool:
    """Return whether a hook is one of FSDP2's."""
    while isinstance(hook, partial):
        hook = hook.func
    owner = type(getattr(hook, "__self__", None)).__module__
    return owner.startswith("torch.distributed.fsdp") or (hook.__module__ or "").startswith("torch.distributed.fsdp")


def adapter_state(module: nn.Module) -> dict[str, Any]:
    """Return which adapters of a head are in use."""
    return {key: module.__dict__[key] for key in _ADAPTER_STATE if key in module.__dict__}


@contextmanager
def in_adapter_state(module: nn.Module, state: dict[str, Any]) -> Iterator[None]:
    """Use the adapters of a head that were in use when it was called (``disable_adapter()`` may have ended since)."""
    now = adapter_state(module)
    module.__dict__.update(state)
    try:
        yield
    finally:
        module.__dict__.update(now)
