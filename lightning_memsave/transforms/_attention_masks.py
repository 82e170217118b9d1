"""Read attention masks: which of them say nothing, or only what ``is_causal=True`` says."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["MaskKind", "MaskReader"]

MaskKind = Literal["none", "causal", "dense"]

# L = queries, S = keys
_CHUNK = 2**22  # values that are looked at at once
_FAR_BELOW = -1e30  # added to a score of fp32 or bf16, it leaves a probability of exactly zero


class MaskReader:
    """Tell masks apart by their values, each mask once until ``clear``.

    A mask counts as ``"none"`` or ``"causal"`` only if every value of it was looked at. Reading costs one pass over the
    mask and, on an accelerator, two synchronisations; views of one mask share what was read.
    """

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()
        self.reads = 0

    def clear(self) -> None:
        """Forget everything: a mask may have been changed in a way its version does not show."""
        self._known = WeakIdKeyDictionary()

    def read(self, mask: Tensor, num_queries: int, num_keys: int, *, true_hides: bool = False) -> MaskKind:
        """Return what a mask of ``(..., L or 1, S or 1)`` says.

        Args:
            mask: Bool, or float to be added to the scores.
            num_queries: L.
            num_keys: S.
            true_hides: True of a bool mask hides a key, as in ``nn.MultiheadAttention``.

        Returns:
            ``"none"`` if it hides nothing, ``"causal"`` if it equals ``is_causal=True`` (only for L = S), else
            ``"dense"``.

        """
        readable = mask.dtype == torch.bool or (mask.is_floating_point() and mask.itemsize > 1)
        if not readable or mask.requires_grad or mask.ndim < 2 or not mask.numel() or not _can_be_read(mask):
            return "dense"
        square = num_queries == num_keys and mask.shape[-2:] == (num_queries, num_keys)
        if mask.is_inference():  # has no version: it may have changed since it was read
            return self._read(mask, square, true_hides)
        base = mask if mask._base is None else mask._base
        known: dict[object, MaskKind] = self._known.setdefault(base, {})  # type: ignore[no-untyped-call]
        key = (mask.shape, mask.stride(), mask.storage_offset(), mask._version, mask.dtype, square, true_hides)
        if key not in known:
            known[key] = self._read(mask, square, true_hides)
        return known[key]

    def _read(self, mask: Tensor, square: bool, true_hides: bool) -> MaskKind:
        self.reads += 1
        mask = mask.detach()
        for dim, stride in enumerate(mask.stride()):
            if stride == 0:  # expanded: one of the copies tells
                mask = mask.narrow(dim, 0, 1)
        limit = float("-inf") if mask.dtype == torch.float16 else _FAR_BELOW
        first, corner = mask[..., -1:, :1], mask[..., :1, -1:]
        looks = (_shows(first, true_hides), _shows(corner, true_hides), _hides(corner, true_hides, limit))
        first_shown, corner_shown, corner_hidden = torch.stack([look.all() for look in looks]).tolist()
        if not first_shown:
            return "dense"
        if corner_shown:
            return "none" if _all_rows(mask, true_hides, limit, causal=False) else "dense"
        if square and corner_hidden and mask.shape[-1] == mask.shape[-2]:
            return "causal" if _all_rows(mask, true_hides, limit, causal=True) else "dense"
        return "dense"


def _can_be_read(mask: Tensor) -> bool:
    if type(mask) is not Tensor or mask.device.type == "meta" or torch._C._get_tracing_state() is not None:
        return False
    return not (mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _shows(values: Tensor, true_hides: bool) -> Tensor:
    return values != true_hides if values.dtype == torch.bool else values == 0


def _hides(values: Tensor, true_hides: bool, limit: float) -> Tensor:
    return values == true_hides if values.dtype == torch.bool else values <= limit


def _all_rows(mask: Tensor, true_hides: bool, limit: float, *, causal: bool) -> bool:
    rows, columns = mask.shape[-2:]
    step = max(1, _CHUNK * rows // mask.numel())
    right = torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, rows, step):
        piece = mask[..., start : start + step, :]
        shown = _shows(piece, true_hides)
        if causal:
            below = torch.ones((piece.shape[-2], columns), dtype=torch.bool, device=mask.device).tril(start)
            shown = torch.where(below, shown, _hides(piece, true_hides, limit))
        right = right & shown.all()
    return bool(right)
