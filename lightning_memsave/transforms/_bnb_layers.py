"""One linear layer <-> bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``, in place.

The layer object stays: only its class, its weight and its ``forward`` change, so names, hooks and other references to
it hold. ``forward`` is ours, because the class's own one fixes the compute dtype at the first call, rewrites a frozen
bias in another dtype, returns 32 bits under autocast, and repacks the weight in eval mode on CPUs with AVX512-BF16
(which then cannot train). The arithmetic is bitsandbytes'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsave._imports import require
from lightning_memsave.transforms._frozen import autocast_dtype, frozen_linear
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms._selection import default_work_device, linear_kind

__all__ = [
    "check_quantized",
    "dequantized_weight",
    "quantize_layer",
    "quantized_bytes",
    "stored_kind",
    "use_our_forward",
]

_INT8_STEP = 1.0 / 127.0


def quantize_layer(
    layer: Any, *, kind: str, double_quant: bool, compute_dtype: torch.dtype | None, subject: str
) -> Callable[[], None]:
    """Quantize the weight of one ``nn.Linear`` (or transformers ``Conv1D``) in place.

    The old weight is released before this returns. Quantized on the default device if that is an accelerator, kept
    on the device where the weight was.

    Args:
        layer: Layer with a floating weight.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double_quant: Also quantize the scales (4-bit kinds).
        compute_dtype: Dtype to multiply in; ``None`` follows autocast, or the input.
        subject: The public class that asks.

    Returns:
        A function that puts class and forward back, with the weight dequantized to the old dtype.

    """
    bnb = require("bitsandbytes", subject)
    weight = layer.get_parameter("weight")
    old_class, old_dtype, device = type(layer), weight.dtype, weight.device
    was_transposed = linear_kind(layer) == "conv1d"
    requires_grad = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}
    hooks = dict(layer._load_state_dict_pre_hooks)
    values = weight.detach()
    if was_transposed:
        values = values.t().contiguous()
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        values = values.float()
    out_features, in_features = values.shape
    packed = _pack(bnb, values, kind, double_quant, default_work_device(values)).to(device)
    added = _become(bnb, layer, kind, in_features, out_features, double_quant)
    layer._parameters["weight"] = packed
    if kind != "int8":
        layer.quant_state = packed.quant_state
    undo_forward = use_our_forward(layer, compute_dtype)

    def undo() -> None:
        undo_forward()
        values = dequantized_weight(layer, old_dtype)
        layer.__class__ = old_class
        for name in added:
            layer.__dict__.pop(name, None)
        layer._load_state_dict_pre_hooks.clear()
        layer._load_state_dict_pre_hooks.update(hooks)
        layer._parameters["weight"] = nn.Parameter(values.t().contiguous() if was_transposed else values)
        for name, flag in requires_grad.items():
            layer.get_parameter(name).requires_grad_(flag)

    return undo


def _pack(bnb: Any, values: Tensor, kind: str, double_quant: bool, device: torch.device) -> Any:
    if kind == "int8":
        return bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to(device)
    return bnb.nn.Params4bit(
        values, requires_grad=False, quant_type=kind, compress_statistics=double_quant, quant_storage=torch.uint8
    ).to(device)


def _become(
    bnb: Any, layer: nn.Module, kind: str, in_features: int, out_features: int, double_quant: bool
) -> list[str]:
    """Change the layer's class and give it the attributes the new class has; return their names."""
    if kind == "int8":
        template = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, device="meta")
        layer._load_state_dict_pre_hooks.update(template._load_state_dict_pre_hooks)
    else:
        template = bnb.nn.Linear4bit(
            in_features, out_features, bias=False, compress_statistics=double_quant, quant_type=kind, device="meta"
        )
        template.support_avx512bf16_for_cpu = False
    added = [name for name in template.__dict__ if name not in layer.__dict__]
    for name in added:
        layer.__dict__[name] = template.__dict__[name]
    layer.__class__ = type(template)
    return added


def use_our_forward(layer: Any, compute_dtype: torch.dtype | None) -> Callable[[], None]:
    """Give a quantized layer, ours or a loaded one, the forward of this module."""
    if linear_kind(layer) == "8bit":
        layer.weight.CB = None  # a second reference, stale after a move
        return patch_forward(layer, _forward_8bit, compute_dtype=compute_dtype)
    layer.support_avx512bf16_for_cpu = False
    return patch_forward(layer, _forward_4bit, compute_dtype=compute_dtype)


def _forward_4bit(patch: InstanceForward, x: Tensor) -> Tensor:
    import bitsandbytes as bnb

    layer: Any = patch.module
    weight, bias = layer.weight, layer.bias
    out_dtype = autocast_dtype(x) or x.dtype
    dtype = patch.options["compute_dtype"] or out_dtype
    # Sharding replaces the parameter object; the layer keeps the state.
    state = _in_dtype(getattr(weight, "quant_state", None) or layer.quant_state, dtype)
    bias = None if bias is None else bias.to(dtype)
    out: Tensor = bnb.matmul_4bit(x.to(dtype), weight.t(), bias=bias, quant_state=state)
    return out.to(out_dtype)


def _in_dtype(state: Any, dtype: torch.dtype) -> Any:
    """Return the quantization state that dequantizes straight to a dtype; tensors are shared."""
    if state.dtype == dtype:
        return state
    state = copy.copy(state)
    state.dtype = dtype
    return state


def _forward_8bit(patch: InstanceForward, x: Tensor) -> Tensor:
    layer: Any = patch.module
    out_dtype = autocast_dtype(x) or x.dtype
    dtype = patch.options["compute_dtype"] or out_dtype
    codes, scales = layer.weight.data, _int8_scales(layer)
    with torch.autocast(x.device.type, enabled=False):
        return frozen_linear(x.to(dtype), layer.bias, _int8_weight, codes, scales).to(out_dtype)


def _int8_scales(layer: Any) -> Tensor:
    """Return the ``(out,)`` fp32 row maxima, on the weight's device (a plain move of the module leaves them behind)."""
    holder = layer.weight if getattr(layer.weight, "SCB", None) is not None else layer.state
    if holder.SCB.device != layer.weight.device:
        holder.SCB = holder.SCB.to(layer.weight.device)
    scales: Tensor = holder.SCB
    return scales


def _int8_weight(dtype: torch.dtype, codes: Tensor, scales: Tensor) -> Tensor:
    """Return ``codes * scales / 127`` rounded once to ``dtype``."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, (scales * _INT8_STEP).unsqueeze(1), out=out)


def dequantized_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the ``(out, in)`` values a quantized layer multiplies with."""
    if linear_kind(layer) == "8bit":
        return _int8_weight(dtype, layer.weight.data, _int8_scales(layer))
    import bitsandbytes as bnb

    weight = layer.weight
    state = getattr(weight, "quant_state", None) or layer.quant_state
    values: Tensor = bnb.functional.dequantize_4bit(weight.data, _in_dtype(state, dtype))
    return values.to(dtype)


def stored_kind(layer: Any) -> str:
    """Return ``nf4``, ``fp4`` or ``int8`` for a quantized layer."""
    return "int8" if linear_kind(layer) == "8bit" else str(layer.weight.quant_type)


def check_quantized(layer: Any) -> str | None:
    """Return what is wrong with a layer that somebody else quantized, or ``None``."""
    weight = layer.weight
    if linear_kind(layer) == "8bit":
        scales = getattr(weight, "SCB", None)
        if weight.dtype != torch.int8 or (scales is None and getattr(layer.state, "SCB", None) is None):
            return "its int8 weight was never quantized (it has no scales)"
        return None
    if getattr(weight, "quant_state", None) is None and getattr(layer, "quant_state", None) is None:
        return "its 4-bit weight was never quantized (it has no quantization state)"
    return None


def quantized_bytes(layer: Any) -> int:
    """Return the bytes of a quantized layer's weight: codes and scales, without bias and shared tables."""
    weight = layer.weight
    if linear_kind(layer) == "8bit":
        return int(weight.nbytes + _int8_scales(layer).nbytes)
    state = getattr(weight, "quant_state", None) or layer.quant_state
    total = weight.nbytes + state.absmax.nbytes + state.code.nbytes
    if state.nested:
        total += state.state2.absmax.nbytes + state.offset.nbytes
    return int(total)
