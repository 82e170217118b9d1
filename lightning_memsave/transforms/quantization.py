"""Quantize frozen linear weights to 4 or 8 bits, layer by layer, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_memsave._imports import require
from lightning_memsave._match import match_modules
from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms._bnb_layers import (
    check_quantized,
    quantize_layer,
    quantized_bytes,
    stored_kind,
    use_our_forward,
)
from lightning_memsave.transforms._fast_path import disable_fast_paths
from lightning_memsave.transforms._mapped import MappedFiles, leave_mapped_files
from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._selection import (
    Selection,
    check_placement,
    linear_kind,
    named_adapters,
    named_selection,
    networks,
    select_linears,
    shared_parameters,
    under,
)

__all__ = ["KINDS", "Quantization", "quantize_weights"]

KINDS = ("nf4", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What to quantize and how.

    Args:
        kind: ``nf4``, ``fp4`` or ``int8``.
        modules: ``("auto",)``, or globs and class names.
        skip: Globs and class names of modules to leave out, with everything below.
        train: Globs and class names of modules that stay trainable, so that they are left out too.
        double_quant: Quantize the scales of the 4-bit kinds too.
        compute_dtype: Dtype of the products; ``None`` follows autocast, or the input.
        subject: The public class that asks, for messages.

    """

    kind: str = "nf4"
    modules: tuple[str, ...] = ("auto",)
    skip: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None
    subject: str = "WeightQuantization"


def quantize_weights(root: nn.Module, settings: Quantization) -> Applied:
    """Quantize and freeze linear weights of ``root`` in place.

    Of ``N`` values in a weight, 4-bit kinds hold ``ceil(N / 2)`` bytes of codes, one scale for 64 values and a table of
    ``64`` bytes; a scale is 4 bytes, or with ``double_quant`` 1 byte plus 4 bytes for 256 scales and 4 for the offset.
    ``int8`` holds ``N`` bytes and ``4 * out`` bytes of scales.

    While it runs, at most one more weight than before or after is held, since each old weight is released before the
    next one is quantized.

    Args:
        root: Any module; layers that are quantized already (by transformers, for example) are kept.
        settings: What and how.

    Returns:
        What was done; ``undo`` puts the dequantized values back.

    Raises:
        ConfigurationError: If weights are sharded, on meta, tied, trained or under adapters, or quantized otherwise.
        NothingToTransformError: If nothing is to be quantized.

    """
    require("bitsandbytes", settings.subject)
    check_placement(root, subject=settings.subject)
    _refuse_adapters(root, settings.subject)
    present = _check_present(root, settings)
    selection = _select(root, settings, present)
    undos: list[Callable[[], None]] = []
    before = after = sum(quantized_bytes(root.get_submodule(name)) for name in present)
    try:
        for name in present:
            undos.append(use_our_forward(root.get_submodule(name), settings.compute_dtype))
        files = MappedFiles()
        for name in selection.names:
            layer = root.get_submodule(name)
            old = layer.get_parameter("weight").detach()
            before += old.nbytes
            undos.append(
                quantize_layer(
                    layer,
                    kind=settings.kind,
                    double_quant=settings.double_quant,
                    compute_dtype=settings.compute_dtype,
                    subject=settings.subject,
                )
            )
            files.release(old)
            del old
            after += quantized_bytes(layer)
        if selection.names:
            leave_mapped_files(root)
        undos.append(_freeze_biases(root, selection.names))
        undos.append(disable_fast_paths(root, [*present, *selection.names]))
    except BaseException:
        _undo_all(undos)
        raise
    return Applied(
        summary=_summary(settings, selection, present),
        num_modules=len(selection.names) + len(present),
        bytes_before=before,
        bytes_after=after,
        undo=lambda: _undo_all(undos),
        persistent=True,
    )


def _undo_all(undos: list[Callable[[], None]]) -> None:
    while undos:
        undos.pop()()


def _refuse_adapters(root: nn.Module, subject: str) -> None:
    adapters = named_adapters(root)
    if adapters:
        raise ConfigurationError(
            f"{subject}: {adapters[0][0]} and {len(adapters) - 1} more layers carry peft adapters already, and weights "
            "are quantized before adapters are added. Build the model without adapters and add QLoRA(...), or "
            "WeightQuantization(...) and LoRA(...)."
        )


def _check_present(root: nn.Module, settings: Quantization) -> list[str]:
    """Return the names of layers that are quantized already, all of the right kind."""
    present = [name for name, m in root.named_modules() if linear_kind(m) in ("4bit", "8bit")]
    for name in present:
        layer = root.get_submodule(name)
        wrong = check_quantized(layer)
        if wrong is None and stored_kind(layer) != settings.kind:
            kind = stored_kind(layer)
            wrong = f"it is {kind} already, and {settings.kind} was asked for; write kind={kind!r}"
        if wrong is not None:
            raise ConfigurationError(f"{settings.subject}: {name} cannot be used as it is: {wrong}.")
    return present


def _select(root: nn.Module, settings: Quantization, present: list[str]) -> Selection:
    subject = settings.subject
    train = _names(root, settings.train, f"{subject} train")
    skip = _names(root, settings.skip, f"{subject} skip")
    for option, prefixes in (("train", train), ("skip", skip)):
        wrong = [name for name in present if under(name, prefixes)]
        if wrong:
            raise ConfigurationError(
                f"{subject}: {option}= selects {wrong[0]}, whose weight is quantized already. Leave it out where it is "
                f"quantized: give the same {option}= to the callback whose loading_config() the model is loaded with."
            )
    if settings.modules != ("auto",):
        return _named(root, settings, train, skip)
    frozen = {n for n, m in root.named_modules() if linear_kind(m) and not m.get_parameter("weight").requires_grad}
    # In a network that was quantized while it was loaded, what its loader left out stays as it is.
    loaded = [prefix for prefix, _ in networks(root) if any(not prefix or under(name, [prefix]) for name in present)]
    if "" in loaded:
        return Selection()
    trained = _trained_linears(root) if frozen - set(present) else []
    try:
        return select_linears(
            root,
            subject=subject,
            kinds=("linear", "conv1d"),
            skip=skip,
            train=[*train, *loaded, *trained],
            quantize=True,
        )
    except NothingToTransformError:
        if present:
            return Selection()
        raise


def _names(root: nn.Module, patterns: Sequence[str], subject: str) -> list[str]:
    return [name for name, _ in match_modules(root, patterns, subject=subject)] if patterns else []


def _trained_linears(root: nn.Module) -> list[str]:
    """Return the linear layers meant to train: those that still do in a model where others are frozen."""
    return [n for n, m in root.named_modules() if linear_kind(m) and m.get_parameter("weight").requires_grad]


def _named(root: nn.Module, settings: Quantization, train: list[str], skip: list[str]) -> Selection:
    subject, tied = settings.subject, shared_parameters(root)
    some_frozen = any(not p.requires_grad for p in root.parameters())
    selection, problems = Selection(), []
    for name in named_selection(root, settings.modules, subject=subject):
        layer = root.get_submodule(name)
        if under(name, skip) or linear_kind(layer) in ("4bit", "8bit"):
            continue
        weight = layer.get_parameter("weight")
        if id(weight) in tied:
            problems.append(f"{name} shares its weight with another module, which cannot read codes")
        elif under(name, train):
            problems.append(f"{name} is in train, and a quantized weight cannot train")
        elif some_frozen and weight.requires_grad:
            problems.append(f"{name} trains (requires_grad=True next to frozen weights), and a quantized weight cannot")
        elif "forward" in layer.__dict__:
            problems.append(f"{name} has a replaced forward, which reads the weight")
        else:
            selection.names.append(name)
    if problems:
        more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise ConfigurationError(f"{subject}: {problems[0]}{more}. Leave it out with skip=[...], or freeze it first.")
    return selection


def _freeze_biases(root: nn.Module, names: Sequence[str]) -> Callable[[], None]:
    """Freeze the biases of quantized layers, unless the user froze the weights before and left the biases training."""
    flags: list[tuple[nn.Parameter, bool]] = []
    for name in names:
        bias: Any = root.get_submodule(name)._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            flags.append((bias, True))
            bias.requires_grad_(False)

    def undo() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return undo


def _summary(settings: Quantization, selection: Selection, present: list[str]) -> str:
    parts = []
    if selection.names:
        parts.append(f"{len(selection.names)} linear weights stored as {settings.kind} and frozen")
    if present:
        parts.append(f"{len(present)} linear weights were {settings.kind} already")
    left_out = selection.describe_left_out()
    return "; ".join(parts) + (f"; left as they are: {left_out}" if left_out else "")
