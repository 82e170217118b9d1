"""Which kernel of ``scaled_dot_product_attention`` runs a call, and why another one cannot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["FORCED", "IMPLEMENTATIONS", "SDPACall", "autocast_is_on", "device_problem", "kernel_of", "why_not"]

# H = heads, L = queries, S = keys, D = head dim
IMPLEMENTATIONS = ("auto", "flash_attention", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flex", "math")
FORCED = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_NAMES = {
    SDPBackend.MATH.value: "math",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cuDNN",
    SDPBackend.OVERRIDEABLE.value: "the device's own",
}
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_CUDA_ONLY = ("sdpa_efficient", "sdpa_cudnn")
_NOISE = ("kernel not used because", "No available kernel", "not been runtime disabled", "been runtime disabled")


@dataclass
class SDPACall:
    """The arguments of one call of ``scaled_dot_product_attention``.

    Args:
        query: ``(..., H, L, D)``.
        key: ``(..., H or fewer, S, D)``.
        value: ``(..., H or fewer, S, D)``.
        mask: ``None``, a bool mask (True attends) or a float mask that is added to the scores.
        dropout: Probability.
        causal: Whether key ``j`` is hidden from query ``i`` for ``j > i``.
        scale: ``None`` for ``1 / sqrt(D)``.
        gqa: Whether groups of query heads share a key head.

    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    gqa: bool = False

    @classmethod
    def bind(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SDPACall:
        """Return the call that ``F.scaled_dot_product_attention(*args, **kwargs)`` is."""
        given = dict(zip(_ARGUMENTS, args)) | dict(kwargs)
        return cls(
            given["query"],
            given["key"],
            given["value"],
            given.get("attn_mask"),
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            given.get("scale"),
            given.get("enable_gqa", False),
        )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments to call ``F.scaled_dot_product_attention`` with."""
        values = (
            self.query,
            self.key,
            self.value,
            self.mask,
            self.dropout,
            self.causal,
            self.scale,
            self.gqa,
        )
        return dict(zip(_ARGUMENTS, values))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype the kernel gets: autocast's, where it is on."""
        device, dtype = self.query.device.type, self.query.dtype
        if dtype == torch.float64 or not autocast_is_on(device):
            return dtype
        return torch.get_autocast_dtype(device)

    def signature(self) -> tuple[Any, ...]:
        """Return what the choice of a kernel depends on."""
        mask = self.mask
        return (
            *((t.shape, t.stride(), t.requires_grad) for t in (self.query, self.key, self.value)),
            None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.requires_grad),
            self.query.device,
            self.compute_dtype,
            self.dropout > 0,
            self.causal,
            self.scale,
            self.gqa,
            torch.is_grad_enabled(),
        )

    def shown(self) -> str:
        """Return the call in words, for a report."""
        dtype = str(self.compute_dtype).removeprefix("torch.")
        mask = "causal" if self.causal else "no mask"
        if self.mask is not None:
            mask = f"a dense {str(self.mask.dtype).removeprefix('torch.')} mask"
        return f"{dtype}, head_dim {self.query.shape[-1]}, {mask}{', dropout' if self.dropout else ''}"


def device_problem(implementation: str, device_type: str) -> str | None:
    """Return why an implementation cannot run on a kind of device, or ``None``."""
    if device_type == "cuda":
        return None
    if implementation in _CUDA_ONLY:
        return f"the kernel exists on CUDA only, and this run is on {device_type}"
    if implementation == "flex" and device_type == "cpu":
        return "flex attention has no backward on the CPU"
    return None


def autocast_is_on(device_type: str) -> bool:
    """Return whether autocast is on for a kind of device; there are kinds that have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def kernel_of(call: SDPACall) -> str:
    """Return the name of the kernel that torch takes under the current settings, ``""`` if it has none."""
    chosen, _ = _ask(call)
    return _NAMES.get(chosen, "")


def why_not(call: SDPACall, backend: SDPBackend) -> str:
    """Return why a kernel cannot run a call, ``""`` if it can."""
    if backend == SDPBackend.MATH:
        return ""
    if call.query.device.type == "cpu" and backend != SDPBackend.FLASH_ATTENTION:
        return "the kernel exists on CUDA only"
    with sdpa_kernel([backend]):
        chosen, said = _ask(call)
    if chosen == backend.value:
        return ""
    return "; ".join(dict.fromkeys(said)) or f"torch gives no reason ({call.shown()})"


def _ask(call: SDPACall) -> tuple[int, list[str]]:
    """Return torch's choice (-1: none) and what it says while choosing."""
    query, key, value = (_stand_in(t, call) for t in (call.query, call.key, call.value))
    mask = call.mask
    if mask is not None and query is not call.query:
        mask = mask[:1] if mask.ndim == call.query.ndim else mask
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    choose: Any = torch._fused_sdp_choice
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            chosen = int(
                choose(query, key, value, mask, call.dropout, call.causal, scale=call.scale, enable_gqa=call.gqa)
            )
        except RuntimeError:
            chosen = SDPBackend.ERROR.value
    texts = [str(w.message).split(" (Triggered internally")[0].strip() for w in said]
    return chosen, [text.rstrip(".:") for text in texts if text and not any(noise in text for noise in _NOISE)]


def _stand_in(tensor: Tensor, call: SDPACall) -> Tensor:
    """Return a tensor as autocast will hand it to the kernel: its layout, one row of the batch, no values."""
    if tensor.dtype == call.compute_dtype:
        return tensor
    shape = (1, *tensor.shape[1:]) if tensor.ndim == 4 else tuple(tensor.shape)
    made = torch.empty_strided(shape, tensor.stride(), dtype=call.compute_dtype, device=tensor.device)
    return made.requires_grad_(tensor.requires_grad)
