"""Byte sizes: ints inside, GiB (2**30) in text."""

from __future__ import annotations

import re

from lightning_memsave.errors import ConfigurationError

__all__ = ["GIB", "KIB", "MIB", "format_bytes", "parse_size"]

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")


def parse_size(size: int | str) -> int:
    """Turn ``"24GiB"``, ``"500MB"`` or an int of bytes into an int of bytes.

    Args:
        size: An int of bytes, or a number with one of the units B, kB, MB, GB, TB
            (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024).

    Returns:
        Bytes, rounded down.

    Raises:
        ConfigurationError: If the text has no unit or one that is not known, or the size is negative.

    Example:
        >>> parse_size("24GiB") == 24 * 2**30
        True
        >>> parse_size("0.5 MB")
        500000

    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ConfigurationError(f"size: asked for {size} bytes, a size is not negative.")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].lower() not in _FACTORS:
        raise ConfigurationError(
            f"size: asked for {size!r}, which is not a size. Write an int of bytes or a number with a unit, "
            'e.g. "24GiB" or "500MB" (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB).'
        )
    return int(float(match[1]) * _FACTORS[match[2].lower()])


def format_bytes(num_bytes: int) -> str:
    """Show bytes for people, in the largest binary unit that keeps the number above one.

    Example:
        >>> format_bytes(3 * 2**30)
        '3.00 GiB'
        >>> format_bytes(1536)
        '1.50 KiB'
        >>> format_bytes(-2**20)
        '-1.00 MiB'

    """
    magnitude = abs(num_bytes)
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes} B"
