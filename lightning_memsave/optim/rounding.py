"""Write fp32 values into narrower tensors by chance, or with a compensation (Kahan)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Rounder", "compensate_into", "hashed", "round_stochastic_into"]

_SEED = 0x6D656D  # the same on every rank: replicas must round alike


def round_stochastic_into(values: Tensor, weight: Tensor, generator: torch.Generator) -> None:
    """Round fp32 values to one of their two bf16 neighbours, in place, so that the mean is the value.

    The upper neighbour (in magnitude) is taken with the probability of the dropped bits: 16 random bits are added
    below the bf16 part of the pattern and what remains there is cut off. Values that bf16 holds stay as they are, and
    so do infinities and NaN.

    Args:
        values: fp32; used as scratch space.
        weight: bf16, of the same shape.
        generator: On the device of ``values``.

    Example:
        >>> halves = torch.full((4000,), 1 + 2.0**-8)  # halfway between 1 and the next bf16
        >>> weight = torch.empty(4000, dtype=torch.bfloat16)
        >>> round_stochastic_into(halves, weight, torch.Generator().manual_seed(0))
        >>> abs(weight.float().mean().item() - (1 + 2.0**-8)) < 3e-4
        True

    """
    nan = values.isnan()
    pattern = values.view(torch.int32)
    pattern.add_(_random_bits(values, generator)).bitwise_and_(-65536)
    values.masked_fill_(nan, torch.nan)
    weight.copy_(values)


def _random_bits(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return int32 values from 0 to 65535: four of one 64-bit draw."""
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    bits = draws.view(torch.int16)[: like.numel()].to(torch.int32).add_(32768)
    return bits.view(like.shape)


def hashed(values: Tensor, step: int) -> Tensor:
    """Return int32 values from 0 to 2 ** 31 - 1: a hash of the bit pattern of each fp32 value and of the step.

    For rounding by chance without a generator: the low bits of a computed value are as good as random, and the same
    values give the same bits after a resume and on every rank.
    """
    mixed = values.view(torch.int32).mul(-1640531535).add_((step * 0x85EBCA6B) & 0x7FFFFFFF)
    return mixed.bitwise_xor_(mixed >> 15).mul_(-2048144777).bitwise_and_(0x7FFFFFFF)


def compensate_into(values: Tensor, weight: Tensor, compensation: Tensor) -> None:
    """Write fp32 values as the nearest bf16 weight and a bf16 compensation of what the rounding lost, in place.

    ``weight + compensation`` is the value to 2 ** -17 (7.6e-6) relative, 2 ** -16 beside the border of its cell, 500
    times closer than the weight alone; and it rounds to the weight again.
    """
    weight.copy_(values)
    nearest = weight.float()
    compensation.copy_(values - nearest)
    # Nearly half a spacing may itself have been rounded to the half, from where the sum rounds to the next weight.
    beyond = nearest.add_(compensation).to(torch.bfloat16).ne(weight)
    compensation.view(torch.int16).sub_(beyond.to(torch.int16))


class Rounder:
    """Random numbers of its own for stochastic rounding: torch's global ones stay as the user seeded them.

    ``state_dict`` holds plain tensors, so that a resumed run rounds as the uninterrupted one does.
    """

    def __init__(self) -> None:
        self._generators: dict[str, torch.Generator] = {}
        self._loaded: dict[str, Tensor] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device, made at the first call."""
        key = device.type
        if key not in self._generators:
            made = torch.Generator(device=device).manual_seed(_SEED)
            if key in self._loaded:
                made.set_state(self._loaded.pop(key))
            self._generators[key] = made
        return self._generators[key]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of every generator by device type."""
        return {**self._loaded, **{key: made.get_state() for key, made in self._generators.items()}}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._loaded = {key: value.cpu() for key, value in state_dict.items()}
        for key in [key for key in self._generators if key in self._loaded]:
            self._generators[key].set_state(self._loaded.pop(key))
