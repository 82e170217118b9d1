"""Adam's moments in one byte a value: blocks of 256 share an fp32 scale, levels are spaced by a square.

A level ``q`` stands for ``(q / top) ** 2 * scale``: fine near zero, where most of a block is, and 1 / ``top`` coarse at
the largest value. What is rounded is rounded by chance, or a moment that changes by less than half a level a step (the
second one does, with ``beta2 = 0.999``) would stay where it is for ever. The chance comes from the low bits of the
value itself and the number of the step: no generator, no state, the same bits after a resume and on every rank.

======= ============== ============================================ ===============================================
moment  dtype          what is stored                               note
======= ============== ============================================ ===============================================
first   ``int8``       ``m``, 127 levels a sign                     reaches zero
second  ``uint8``      ``sqrt(v)``, 255 levels                      at least one level, so that no step divides by 0
======= ============== ============================================ ===============================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsave.optim.rounding import hashed

__all__ = ["MOMENT_BLOCK", "decode_first", "decode_second", "encode_first", "encode_second", "moment_bytes"]

MOMENT_BLOCK = 256  # values that share one fp32 scale
_FIRST, _SECOND = 127.0, 255.0
_TINY = 1e-38  # the scale of a block of zeros


def moment_bytes(num_elements: int) -> int:
    """Return the bytes of both moments: two bytes a value and two fp32 scales a block of 256.

    Example:
        >>> moment_bytes(4096)
        8320

    """
    return 2 * (num_elements + 4 * -(-num_elements // MOMENT_BLOCK))


def decode_first(levels: Tensor, scales: Tensor) -> Tensor:
    """Return the first moment of ``(blocks, values)`` int8 levels and one scale a block."""
    values = levels.float()
    return values.mul_(values.abs()).mul_((scales / _FIRST**2).unsqueeze(1))


def decode_second(levels: Tensor, scales: Tensor) -> Tensor:
    """Return the second moment (not its root) of ``(blocks, values)`` uint8 levels and one scale a block."""
    values = levels.float()
    return values.square_().mul_((scales / _SECOND**2).unsqueeze(1)).square_()


def encode_first(values: Tensor, levels: Tensor, scales: Tensor, step: int) -> None:
    """Write ``(blocks, values)`` of a first moment as levels and scales, in place."""
    size = values.abs()
    torch.amax(size, 1, out=scales)
    size.div_(scales.clamp(min=_TINY).unsqueeze(1)).sqrt_().mul_(_FIRST)
    size.add_(_chance(values, step)).floor_().clamp_(max=_FIRST)
    levels.copy_(size.copysign_(values))


def encode_second(root: Tensor, levels: Tensor, scales: Tensor, step: int) -> None:
    """Write ``(blocks, values)`` of the root of a second moment as levels and scales, in place.

    Args:
        root: Not negative.
        levels: uint8.
        scales: fp32, one a block.
        step: Of the optimizer.

    """
    torch.amax(root, 1, out=scales)
    size = root.div(scales.clamp(min=_TINY).unsqueeze(1)).sqrt_().mul_(_SECOND)
    size.add_(_chance(root, step)).floor_().clamp_(1.0, _SECOND)
    levels.copy_(size)


def _chance(values: Tensor, step: int) -> Tensor:
    """Return a number from [0, 1) for every fp32 value: a hash of its bit pattern and the step."""
    # of 31 bits the upper 23, which fp32 holds
    return hashed(values, step).bitwise_and_(0x7FFFFF00).float().mul_(2.0**-31)
