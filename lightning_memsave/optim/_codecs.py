"""Moments in 4 bits and in fp8, block by block, in plain torch operations.

A codec reads and writes a stretch of values that begins at a multiple of its block size.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["FOUR_BITS", "FP8", "Codec", "dynamic_table"]


class Codec(ABC):
    """One width of the two moments of Adam.

    Args:
        bits: Of a code.
        block_size: Values that share one fp32 scale.

    """

    def __init__(self, bits: int, block_size: int) -> None:
        self.bits, self.block_size = bits, block_size

    def state_bytes(self, num_values: int) -> int:
        """Return the bytes of one moment: ``bits / 8`` a value and 4 a block.

        Example:
            >>> FOUR_BITS.state_bytes(256), FP8.state_bytes(256)
            (136, 260)

        """
        return -(-num_values * self.bits // 8) + 4 * -(-num_values // self.block_size)

    def zeros(self, name: str, num_values: int, device: torch.device) -> dict[str, Tensor]:
        """Return codes and scales that stand for zeros."""
        codes = torch.zeros(-(-num_values * self.bits // 8), dtype=torch.uint8, device=device)
        scales = torch.zeros(-(-num_values // self.block_size), dtype=torch.float32, device=device)
        return {name: codes, f"{name}_scale": scales}

    def read(self, state: MutableMapping[str, Any], name: str, part: slice) -> Tensor:
        """Return ``(part,)`` fp32 values."""
        codes, scales = self._parts(state, name, part)
        values = self._decode(codes, second=name.endswith("_sq"))
        padded = _in_blocks(values, self.block_size).mul_(scales.unsqueeze(1)).view(-1)
        return self._opened(padded[: part.stop - part.start], name)

    def write(self, state: MutableMapping[str, Any], name: str, part: slice, values: Tensor) -> None:
        """Store fp32 values."""
        codes, scales = self._parts(state, name, part)
        blocks = _in_blocks(self._closed(values, name), self.block_size)
        largest = blocks.abs().amax(dim=1)
        scales.copy_(largest)
        # a block of zeros has a scale of zero, whatever its codes
        relative = (blocks / largest.clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).view(-1)
        codes.copy_(self._encode(relative, second=name.endswith("_sq"))[: codes.numel()])

    def _parts(self, state: MutableMapping[str, Any], name: str, part: slice) -> tuple[Tensor, Tensor]:
        start, stop = part.start * self.bits // 8, -(-part.stop * self.bits // 8)
        blocks = slice(part.start // self.block_size, -(-part.stop // self.block_size))
        return state[name][start:stop], state[f"{name}_scale"][blocks]

    def _opened(self, values: Tensor, name: str) -> Tensor:
        """Return the moment of what is stored."""
        return values

    def _closed(self, values: Tensor, name: str) -> Tensor:
        """Return what is stored of a moment."""
        return values

    @abstractmethod
    def _decode(self, codes: Tensor, *, second: bool) -> Tensor:
        """Return fp32 values of at most 1 in size."""

    @abstractmethod
    def _encode(self, relative: Tensor, *, second: bool) -> Tensor:
        """Return uint8 codes of values of at most 1 in size, which may be overwritten."""


def _in_blocks(values: Tensor, size: int) -> Tensor:
    missing = -values.numel() % size
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, size)


class _FourBits(Codec):
    """Two codes a byte: a dynamic table for the first moment, 1/16 to 16/16 for the second.

    The second moment has no code for zero, which would be divided by.
    """

    def __init__(self) -> None:
        super().__init__(bits=4, block_size=128)

    def _decode(self, codes: Tensor, *, second: bool) -> Tensor:
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).view(-1).to(torch.int32)
        return _table(second, codes.device).index_select(0, pairs)

    def _encode(self, relative: Tensor, *, second: bool) -> Tensor:
        table = _table(second, relative.device)
        nearest = torch.bucketize(relative, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
        return nearest[:, 0] | (nearest[:, 1] << 4)


class _Fp8(Codec):
    """One fp8 (e4m3) value a byte: the first moment, and the root of the second.

    The root needs half the range in powers of two; it is never rounded to zero, which would be divided by.
    """

    _LARGEST, _SMALLEST = 448.0, 2.0**-9

    def __init__(self) -> None:
        super().__init__(bits=8, block_size=256)

    def _opened(self, values: Tensor, name: str) -> Tensor:
        return values.square() if name.endswith("_sq") else values

    def _closed(self, values: Tensor, name: str) -> Tensor:
        return values.sqrt() if name.endswith("_sq") else values

    def _decode(self, codes: Tensor, *, second: bool) -> Tensor:
        return codes.view(torch.float8_e4m3fn).to(torch.float32).div_(self._LARGEST)

    def _encode(self, relative: Tensor, *, second: bool) -> Tensor:
        scaled = relative.mul_(self._LARGEST)
        if second:
            scaled.clamp_(min=self._SMALLEST)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


@functools.lru_cache(maxsize=16)
def _table(second: bool, device: torch.device) -> Tensor:
    values = [index / 16 for index in range(1, 17)] if second else dynamic_table(4)
    return torch.tensor(values, dtype=torch.float32, device=device)


def dynamic_table(bits: int) -> list[float]:
    """Return the signed dynamic data type: the bits after the leading zeros divide each power of ten evenly.

    Example:
        >>> dynamic_table(3)
        [-0.775, -0.325, -0.055, 0.0, 0.055, 0.325, 0.775, 1.0]

    Source:
        Dettmers et al. 2022, https://arxiv.org/abs/2110.02861, section 2.2.

    """
    positive = []
    for exponent in range(bits - 1):
        count, power = 2**exponent, 10.0 ** (exponent - bits + 2)
        positive += [power * (0.1 + 0.9 * (index + 0.5) / count) for index in range(count)]
    return [round(value, 9) for value in (*(-v for v in reversed(positive)), 0.0, *positive, 1.0)]


FOUR_BITS: Codec = _FourBits()
FP8: Codec = _Fp8()
