"""Split fp32 values into bf16 weights and a small integer correction, and join them again.

The weight is the nearest bf16 value, exactly what ``.to(torch.bfloat16)`` gives. The correction is the rest, counted
in the bit pattern: an fp32 number and its bf16 rounding differ by at most 2 ** 15 steps of the fp32 pattern, so 16
bits hold the rest as it is and 8 bits hold it in steps of 257. Counting in the pattern needs no exponent arithmetic and
is right for zeros, denormals and the ends of a binade; NaN and infinities live in the weight.

=========== ================================= ============================================================
correction  bytes a value, with the weight    worst error of ``join(*split(x))``
=========== ================================= ============================================================
``int8``    3                                 129 steps: 1.54e-5 relative (bf16 alone 3.9e-3)
``int16``   4                                 0, but one step (1.2e-7) on exact ties between two bf16 values
=========== ================================= ============================================================

``join(w, c).to(torch.bfloat16)`` is ``w`` for every finite ``w`` and every ``c`` that ``split`` makes, so a checkpoint
of joined fp32 values loads into bf16 weights without moving one, and splitting it again gives the same pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memsave.optim.rounding import hashed

__all__ = [
    "BLOCK",
    "CORRECTIONS",
    "attach_correction",
    "correction_of",
    "draw_correction",
    "join",
    "join_into",
    "split",
    "split_into",
    "take_correction",
]

CORRECTIONS: dict[str, torch.dtype] = {"int8": torch.int8, "int16": torch.int16}
BLOCK = 2**18  # values that are held in fp32 at a time when a whole tensor is split or joined

_STEP = 257
_LARGEST = 127 * _STEP  # 32639: below 2 ** 15, so that no correction reaches the next weight
_ATTRIBUTE = "_memsave_correction"


def split(values: Tensor, correction: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Return the nearest bf16 weights and the corrections of fp32 values.

    Args:
        values: fp32, any shape and device; contiguous tensors are worked on in blocks, so that no fp32 copy appears.
        correction: ``torch.int8`` or ``torch.int16``.

    Example:
        >>> w, c = split(torch.tensor([1.0, 1.001, -3.14159]))
        >>> join(w, c)
        tensor([ 1.0000,  1.0010, -3.1416])

    """
    weight = torch.empty_like(values, dtype=torch.bfloat16)
    rest = torch.empty_like(values, dtype=correction)
    if not values.is_contiguous():
        split_into(values, weight, rest)
        return weight, rest
    for start in range(0, values.numel(), BLOCK):
        part = slice(start, start + BLOCK)
        split_into(values.view(-1)[part], weight.view(-1)[part], rest.view(-1)[part])
    return weight, rest


def join(weight: Tensor, correction: Tensor) -> Tensor:
    """Return the fp32 values of bf16 weights and their corrections.

    Example:
        >>> join(torch.ones(1, dtype=torch.bfloat16), torch.tensor([127], dtype=torch.int8))
        tensor([1.0039])

    """
    values = weight.float()
    # A contiguous bf16 tensor's fp32 pattern is its own, 16 places up; the correction is added to it as an integer.
    values.view(torch.int32).add_(correction, alpha=_STEP if correction.dtype == torch.int8 else 1)
    return values


def join_into(weight: Tensor, correction: Tensor, out: Tensor) -> Tensor:
    """Do what ``join`` does into an fp32 tensor that is there."""
    out.copy_(weight)
    out.view(torch.int32).add_(correction, alpha=_STEP if correction.dtype == torch.int8 else 1)
    return out


def split_into(values: Tensor, weight: Tensor, correction: Tensor, step: int | None = None) -> None:
    """Write the split of fp32 values into a bf16 and an ``int8`` or ``int16`` tensor, in place.

    Args:
        values: fp32.
        weight: bf16.
        correction: Of the same shape.
        step: ``None`` rounds an int8 correction to the nearest. A number rounds it by chance (see ``hashed``), within
            256 steps of the pattern: in training, updates below half a step (1.5e-5) would be lost every time.

    """
    weight.copy_(values)
    rest = values.view(torch.int32) - weight.float().view(torch.int32)
    if correction.dtype == torch.int8:
        # 65281 / 2 ** 24 = 1 / 257 to 6e-8: a division that gives c for c * 257, whatever is added from 128 to
        # 2 ** 24 - 128, and stays within 32 bits.
        rest = rest.clamp_(-_LARGEST, _LARGEST).mul_(65281)
        rest = rest.add_(2**23) if step is None else rest.add_(hashed(values, step).bitwise_and_(0xFFFF00)).add_(128)
        rest = rest.bitwise_right_shift_(24)
    else:
        rest = rest.clamp_(-32768, 32767)
    correction.copy_(rest)


def draw_correction(weight: Tensor, correction: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return corrections drawn uniformly from the cell of each bf16 weight, on the weight's device.

    For weights whose fp32 values are not known: with zeros every value would start in the middle of its cell, and the
    forward pass would see nothing of small updates until they add up to half a cell.

    Args:
        weight: Gives the shape, the strides and the device.
        correction: ``torch.int8`` or ``torch.int16``.
        generator: On the CPU, so that a seed gives the same corrections on every device and rank.

    """
    bound = 127 if correction == torch.int8 else 32767
    drawn = torch.empty(weight.shape, dtype=correction, device="cpu")
    drawn.random_(-bound, bound + 1, generator=generator)
    return torch.empty_like(weight, dtype=correction).copy_(drawn)


# -- corrections that wait for their optimizer ------------------------------------------------------------------------
# Between the cast and the first step a correction is an attribute of its parameter. Module.to(device) keeps the
# parameter object and so the attribute; a deep copy of a parameter has none and starts as any bf16 weight does.


def attach_correction(parameter: Any, correction: Tensor) -> None:
    """Keep a correction with its parameter until ``take_correction``, or until the weights are overwritten."""
    setattr(parameter, _ATTRIBUTE, (correction, parameter._version))


def correction_of(parameter: Any) -> Tensor | None:
    """Return the correction kept with a parameter, or ``None``: none is kept, or the weights changed since."""
    correction, version = getattr(parameter, _ATTRIBUTE, (None, 0))
    return correction if correction is not None and version == parameter._version else None


def take_correction(parameter: Any) -> Tensor | None:
    """Return the correction kept with a parameter on the parameter's device, and keep it no longer."""
    correction = correction_of(parameter)
    if hasattr(parameter, _ATTRIBUTE):
        delattr(parameter, _ATTRIBUTE)
    return None if correction is None else correction.to(parameter.device)
