"""Add low-rank adapters (LoRA, rsLoRA, DoRA) to any module with peft, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_memsave._imports import require
from lightning_memsave._match import match_modules
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._adapter_layers import cast_weights_not_inputs, lean_adapter
from lightning_memsave.transforms._fast_path import disable_fast_paths
from lightning_memsave.transforms._frozen_storage import lean_frozen_layers, store_frozen
from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._selection import (
    check_placement,
    head_layers,
    is_adapter,
    linear_kind,
    named_adapters,
    named_selection,
    select_linears,
    under,
)
from lightning_memsave.units import MIB, format_bytes

__all__ = ["ADAPTER_NAME", "VARIANTS", "Adapters", "add_adapters", "parameter_bytes"]

VARIANTS = ("lora", "rslora", "dora")
ADAPTER_NAME = "default"
_OTHERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which adapters to add where.

    Args:
        rank: Rank of the change of each weight.
        alpha: The change is scaled by ``alpha / rank`` (rslora: ``alpha / sqrt(rank)``).
        dropout: Probability of dropping an input of the adapter.
        modules: ``("auto",)``, or globs and class names.
        variant: ``lora``, ``rslora`` or ``dora``.
        train: Globs and class names of modules that stay trainable next to the adapters.
        frozen_dtype: Store frozen matrices in this dtype; ``None`` leaves them.
        adapter_dtype: Dtype of the adapter's weights.
        subject: The public class that asks, for messages.

    """

    rank: int
    alpha: float
    dropout: float = 0.0
    modules: tuple[str, ...] = ("auto",)
    variant: str = "lora"
    train: tuple[str, ...] = ()
    frozen_dtype: torch.dtype | None = None
    adapter_dtype: torch.dtype = torch.float32
    subject: str = "LoRA"


def add_adapters(root: nn.Module, settings: Adapters) -> Applied:
    """Freeze ``root`` and add adapters to its linear layers, in place.

    Names outside the adapted layers do not change; inside, they are peft's (``base_layer``, ``lora_A.default`` ...).
    Each adapted weight gets ``rank * (in + out)`` trained values.

    Args:
        root: Any module; quantized layers get peft's quantized adapter layers.
        settings: What and where.

    Returns:
        What was done; ``undo`` takes the adapters out and makes trainable again what was.

    Raises:
        ConfigurationError: If there are adapters already, or weights are sharded or on meta.
        NothingToTransformError: If there is no layer to adapt.

    """
    peft = require("peft", settings.subject)
    check_placement(root, subject=settings.subject)
    present = named_adapters(root)
    if present:
        raise ConfigurationError(
            f"{settings.subject}: {present[0][0]} and {len(present) - 1} more layers carry peft adapters already. Use "
            f"the model with its own adapters and drop {settings.subject}, or build it without them."
        )
    train = (
        [n for n, _ in match_modules(root, settings.train, subject=f"{settings.subject} train")]
        if settings.train
        else []
    )
    names = _targets(root, settings, train)
    heads = _maybe_new_heads(root, train)
    before = parameter_bytes(root)
    undos: list[Callable[[], None]] = []
    try:
        undos.append(_freeze(root, train, settings.subject))
        undos.append(lambda: _take_out(root, names))
        _inject(peft, root, names, settings)
        layers = [root.get_submodule(name) for name in names]
        for layer in layers:
            undos += lean_adapter(layer)
        for layer in _trained_linears(root, train):
            undos.append(cast_weights_not_inputs(layer))
        undos += lean_frozen_layers(root)
        if settings.frozen_dtype is not None:
            undos += store_frozen(root, settings.frozen_dtype)
        undos.append(disable_fast_paths(root, names))
    except BaseException:
        _undo_all(undos)
        raise
    return Applied(
        summary=_summary(root, settings, names, heads),
        num_modules=len(names),
        bytes_before=before,
        bytes_after=parameter_bytes(root),
        undo=lambda: _undo_all(undos),
        persistent=True,
    )


def _undo_all(undos: list[Callable[[], None]]) -> None:
    while undos:
        undos.pop()()


def parameter_bytes(root: nn.Module) -> int:
    """Return the bytes of all parameters, tied ones once, as they are stored."""
    return sum(p.nbytes for p in root.parameters())


def _targets(root: nn.Module, settings: Adapters, train: list[str]) -> list[str]:
    if settings.modules == ("auto",):
        kinds = ("linear", "conv1d", "4bit", "8bit")
        return select_linears(root, subject=settings.subject, kinds=kinds, train=train).names  # type: ignore[arg-type]
    names = named_selection(root, settings.modules, subject=settings.subject, others=_OTHERS)
    both = [name for name in names if under(name, train)]
    if both:
        raise ConfigurationError(
            f"{settings.subject}: {both[0]} is selected by modules= and by train=. An adapter freezes its layer: keep "
            "one of the two."
        )
    return names


def _freeze(root: nn.Module, train: list[str], subject: str) -> Callable[[], None]:
    """Freeze everything but the ``train`` modules."""
    flags = [(p, p.requires_grad) for p in root.parameters()]
    kept = {id(p) for name in train for p in root.get_submodule(name).parameters()}
    packed = [n for n, p in root.named_parameters() if id(p) in kept and not p.is_floating_point()]
    if packed:
        raise ConfigurationError(
            f"{subject}: train= selects {packed[0]}, which is quantized and cannot train. Leave its layer out of the "
            f"quantization: WeightQuantization(skip=...), or train= of QLoRA."
        )
    if train and not any(p.requires_grad for p in root.parameters() if id(p) in kept):
        raise ConfigurationError(
            f"{subject}: every parameter below {', '.join(train)} is frozen (requires_grad=False), and train= keeps "
            "what trains. Unfreeze it in your module, or drop train=."
        )
    for parameter, _ in flags:
        if id(parameter) not in kept:
            parameter.requires_grad_(False)

    def undo() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return undo


def _inject(peft: Any, root: nn.Module, names: list[str], settings: Adapters) -> None:
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[f"root.{name}" for name in names],
        use_rslora=settings.variant == "rslora",
        use_dora=settings.variant == "dora",
        bias="none",
    )
    # peft looks for `config`, `hf_device_map`, `peft_config` ... on the root it is given, and LightningModules have
    # attributes of such names with other meanings. This root has none, and the flags that make peft use its layers for
    # quantized weights (without them, merging fails).
    neutral = nn.Module()
    neutral.add_module("root", root)
    neutral.is_loaded_in_4bit = neutral.is_loaded_in_8bit = True  # type: ignore[assignment]
    frozen = [(p, p.requires_grad) for p in root.parameters()]
    with _same_random_numbers_on_all_ranks(), _plain_defaults(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        peft.inject_adapter_in_model(config, neutral, adapter_name=ADAPTER_NAME)
    for parameter, flag in frozen:
        parameter.requires_grad_(flag)
    for name in names:
        layer: Any = root.get_submodule(name)
        for held in layer.adapter_layer_names:
            adapters = getattr(layer, held)
            if ADAPTER_NAME in adapters:
                adapters[ADAPTER_NAME] = adapters[ADAPTER_NAME].to(settings.adapter_dtype)
        for parameter_name, parameter in layer.named_parameters():
            if not parameter_name.startswith("base_layer."):
                parameter.requires_grad_(True)


def _take_out(root: nn.Module, names: list[str]) -> None:
    for name in names:
        layer: Any = root.get_submodule(name)
        if is_adapter(layer):
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, layer.base_layer)


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """Make new tensors fp32 on the CPU, whatever the precision plugin and the strategy set as defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _same_random_numbers_on_all_ranks() -> Iterator[None]:
    """Draw the same random numbers in all processes: a sharding strategy does not broadcast new weights."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    own = torch.random.get_rng_state()
    state = [own]
    dist.broadcast_object_list(state, src=0)
    torch.random.set_rng_state(state[0])
    try:
        yield
    finally:
        if dist.get_rank() != 0:
            torch.random.set_rng_state(own)


def _trained_linears(root: nn.Module, train: list[str]) -> list[nn.Module]:
    found = []
    for name in train:
        for module in root.get_submodule(name).modules():
            trains = linear_kind(module) == "linear" and module.get_parameter("weight").requires_grad
            if trains and "forward" not in module.__dict__:
                found.append(module)
    return found


def _maybe_new_heads(root: nn.Module, train: list[str]) -> list[str]:
    """Return the heads that may have been drawn rather than loaded: those that are not the size of a vocabulary."""
    sizes = {m.num_embeddings for m in root.modules() if isinstance(m, nn.Embedding)}
    heads = {name: root.get_submodule(name) for name in head_layers(root) if not under(name, train)}
    return sorted(name for name, head in heads.items() if getattr(head, "out_features", None) not in sizes)


def _summary(root: nn.Module, settings: Adapters, names: list[str], heads: list[str]) -> str:
    trained = sum(p.numel() for p in root.parameters() if p.requires_grad)
    wide = sum(p.nbytes for p in root.parameters() if not p.requires_grad and p.dtype == torch.float32 and p.dim() > 1)
    text = f"rank-{settings.rank} {settings.variant} adapters on {len(names)} layers; {trained:,} values train"
    if settings.train:
        text += f", with {', '.join(settings.train)}"
    if heads and not settings.train:
        text += f"; the head {heads[0]} is frozen (if it is new, write train={heads[0]!r})"
    if wide >= 64 * MIB and settings.frozen_dtype is None:
        text += f"; frozen_dtype='bf16' would free {format_bytes(wide // 2)} of fp32 weights"
    return text
