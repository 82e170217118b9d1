"""Which results selective checkpointing keeps: those that cost much arithmetic and few bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["keep_products"]

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: (0, 1), _aten.addmm.default: (1, 2), _aten._scaled_mm.default: (0, 1)}
_BATCHED = {_aten.bmm.default: (0, 1), _aten.baddbmm.default: (1, 2)}
_CONVOLUTIONS = {_aten.convolution.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}
_ATTENTION_LIBRARIES = ("flash_attn", "xformers")
# A product over fewer values costs less than the memory traffic of keeping its result (the thin ones of LoRA).
_MIN_INNER = 64


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep matrix products, convolutions and fused attention; recompute the rest.

    Attention scores are an exception: a batched product larger than what went in (tokens * tokens) is recomputed.

    Args:
        context: From ``create_selective_checkpoint_contexts``.
        operator: The ATen operator.
        args: Its arguments.
        kwargs: Its keyword arguments.

    """
    keep = operator in _CONVOLUTIONS or operator in _ATTENTION or _is_attention(operator)
    if operator in _PRODUCTS:
        left = args[_PRODUCTS[operator][0]]
        keep = left.shape[-1] >= _MIN_INNER
    elif operator in _BATCHED:
        left, right = (args[position] for position in _BATCHED[operator])
        result = left.shape[0] * left.shape[1] * right.shape[2]
        keep = left.shape[-1] >= _MIN_INNER and result <= _num(left) + _num(right)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _is_attention(operator: Any) -> bool:
    of_a_library = str(getattr(operator, "namespace", "")).startswith(_ATTENTION_LIBRARIES)
    return of_a_library or getattr(operator, "__name__", "") == "flex_attention"


def _num(tensor: Tensor) -> int:
    return tensor.shape[0] * tensor.shape[1] * tensor.shape[2]
