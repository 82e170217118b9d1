"""Cast a model to bf16 tensor by tensor, all but the modules that compute in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_memsave._match import match_modules
from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms._adapter_layers import adapter_parameters
from lightning_memsave.transforms._mapped import MappedFiles, leave_mapped_files

__all__ = ["NORMS", "Cast", "cast_to_bf16"]

NORMS = "*norm*"
_SUBJECT = "BF16Precision"
_WIDE = (torch.float32, torch.float64, torch.float16)
_MATRICES = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


@dataclass
class Cast:
    """What a cast did.

    Args:
        trained: Trainable parameters that are bf16 now, with the fp32 values they had handed to ``keep``.
        known: Trainable parameters that were bf16 before.
        frozen: Frozen parameters that were cast.
        kept: Modules that compute in fp32, by name.
        bytes_before: Of all parameters.
        bytes_after: The same.

    """

    trained: list[nn.Parameter]
    known: list[nn.Parameter]
    frozen: int
    kept: list[str]
    bytes_before: int
    bytes_after: int


def cast_to_bf16(
    root: nn.Module, keep_fp32: Sequence[str], keep: Callable[[nn.Parameter, Tensor], Tensor] | None = None
) -> Cast:
    """Cast parameters and buffers to bf16 in place, one at a time, and let kept modules compute in fp32.

    Parameters stay the same objects. Adapters, quantized weights, integers, complex numbers and the state of metrics
    are left alone. A kept module takes its floating inputs in fp32 and returns bf16, by hooks on the instance.

    Args:
        root: Changed in place; what is bf16 already stays.
        keep_fp32: ``"*norm*"`` for every normalization layer, globs or class names. Routers of a mixture of experts
            and tables of rotary embeddings are kept in any case.
        keep: ``(parameter, fp32 values) -> bf16 values`` for a trainable parameter, before its values are lost.

    Raises:
        ConfigurationError: If a parameter is sharded.
        NothingToTransformError: If a pattern of the user selects nothing.

    """
    sharded = [name for name, p in root.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise ConfigurationError(
            f"{_SUBJECT}: {sharded[0]} and {len(sharded) - 1} more parameters are sharded (DTensor) already, and the "
            'cast must see whole weights. Use strategy="ddp" or one device, or a MixedPrecisionPolicy of FSDP2.'
        )
    kept = _kept_modules(root, keep_fp32)
    wide = {id(p) for _, module in kept for p in module.parameters()} | {id(p) for p in adapter_parameters(root)}
    _keep_tied(root, kept, wide)
    before = sum(p.nbytes for p in root.parameters())
    cast = Cast([], [], 0, [name for name, _ in kept], before, 0)
    files = MappedFiles()
    for p in root.parameters():
        _cast_parameter(p, wide, keep, cast, files)
    _cast_buffers(root, {id(m) for _, module in kept for m in module.modules()})
    for _, module in kept:
        _compute_in_fp32(module)
    for module in root.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    if cast.trained or cast.frozen:
        leave_mapped_files(root)
    cast.bytes_after = sum(p.nbytes for p in root.parameters())
    return cast


def _cast_parameter(
    p: nn.Parameter,
    wide: set[int],
    keep: Callable[[nn.Parameter, Tensor], Tensor] | None,
    cast: Cast,
    files: MappedFiles,
) -> None:
    if id(p) in wide:
        return
    if p.dtype == torch.bfloat16:
        cast.known += [p] if p.requires_grad else []
    elif p.dtype in _WIDE and type(p) is nn.Parameter:
        values = p.detach()
        if p.requires_grad and keep is not None:
            p.data = keep(p, values if values.dtype == torch.float32 else values.float())
        else:
            p.data = values.to(torch.bfloat16)
        files.release(values)
        if p.requires_grad:
            cast.trained.append(p)
        else:
            cast.frozen += 1


def _cast_buffers(root: nn.Module, kept: set[int]) -> None:
    left_alone = {id(m) for metric in root.modules() if _is_metric(metric) for m in metric.modules()}
    for module in root.modules():
        if id(module) in kept or id(module) in left_alone:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in _WIDE and type(buffer) is Tensor:
                module._buffers[name] = buffer.to(torch.bfloat16)


# -- which modules stay fp32 -------------------------------------------------------------------------------------------
def _kept_modules(root: nn.Module, keep_fp32: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the outermost modules to keep; each holds parameters or buffers."""
    patterns = [pattern for pattern in keep_fp32 if pattern != NORMS]
    try:
        chosen = {id(m) for _, m in match_modules(root, patterns, subject=_SUBJECT)} if patterns else set()
    except NothingToTransformError as error:
        raise NothingToTransformError(str(error).replace("modules=", "keep_fp32=")) from None
    parents = {f"{name}.{child}" if name else child: m for name, m in root.named_modules() for child in m._modules}
    found: list[tuple[str, nn.Module]] = []
    inside: set[int] = set()
    for name, module in root.named_modules():
        if not name or id(module) in inside or _is_metric(module):
            continue
        keep = id(module) in chosen or (NORMS in keep_fp32 and is_norm(name, module))
        if keep or is_router(name, module, parents[name]) or is_rotary(name, module):
            inside |= {id(m) for m in module.modules()}
            if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
                found.append((name, module))
    return found


def _keep_tied(root: nn.Module, kept: list[tuple[str, nn.Module]], wide: set[int]) -> None:
    """Keep the modules that share a kept parameter, e.g. the head of a kept embedding."""
    inside = {id(m) for _, module in kept for m in module.modules()}
    for name, module in root.named_modules():
        own = {id(p) for p in module._parameters.values() if p is not None}
        shares = own & {id(p) for _, m in kept for p in m.parameters()}
        if name and id(module) not in inside and shares:
            kept.append((name, module))
            wide |= own


def is_norm(name: str, module: nn.Module) -> bool:
    """Return whether a module is a normalization layer: a leaf whose class or name says so."""
    said = any("norm" in cls.__name__.lower() for cls in type(module).__mro__ if cls is not nn.Module)
    said = said or "norm" in name.rpartition(".")[2].lower()
    return said and not module._modules and not isinstance(module, _MATRICES)


def is_router(name: str, module: nn.Module, parent: nn.Module) -> bool:
    """Return whether a module chooses experts: called a router, or a gate beside ``experts`` (not a ``gate_proj``)."""
    last = name.rpartition(".")[2].lower()
    if "router" in type(module).__name__.lower() or last == "router":
        return True
    return last in ("gate", "wg") and any("expert" in child.lower() for child in parent._modules)


def is_rotary(name: str, module: nn.Module) -> bool:
    """Return whether a module holds the tables of a rotary embedding: bf16 frequencies are wrong at long distances."""
    said = "rotary" in type(module).__name__.lower() or "rotary" in name.rpartition(".")[2].lower()
    return said and next(module.parameters(), None) is None


def _is_metric(module: nn.Module) -> bool:
    return any(cls.__name__ == "Metric" and cls.__module__.startswith("torchmetrics") for cls in type(module).__mro__)


# -- how they compute --------------------------------------------------------------------------------------------------
def _compute_in_fp32(module: nn.Module) -> None:
    # module-level functions: a deep copy of the module keeps its hooks, and asking twice installs one
    if _inputs_to_fp32 not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_inputs_to_fp32, with_kwargs=True)
        module.register_forward_hook(_outputs_to_bf16)


def _inputs_to_fp32(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _converted(args, torch.float32), _converted(kwargs, torch.float32)


def _outputs_to_bf16(module: nn.Module, args: Any, output: Any) -> Any:
    return _converted(output, torch.bfloat16)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in (*_WIDE, torch.bfloat16) and type(value) in _TENSORS else value
    if type(value) in (list, tuple):
        return type(value)(_converted(item, dtype) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_converted(item, dtype) for item in value))
    if type(value) is dict:
        return {key: _converted(item, dtype) for key, item in value.items()}
    return value


_TENSORS = (Tensor, nn.Parameter)
