"""What a bf16 weight keeps beside it so that small updates are not lost: three ways, one interface.

============ ========================== ============================ ==============================================
way          kept with each weight      bytes a value, with weight   a step smaller than half a bf16 spacing
============ ========================== ============================ ==============================================
stochastic   nothing                    2                            happens with its probability; right on average
split        int8 (int16) correction    3 (4)                        is kept to 1.5e-5 (1.2e-7) of the weight
kahan        bf16 compensation          4                            is kept to 7.6e-6 of the weight
============ ========================== ============================ ==============================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_memsave.optim.rounding import Rounder, compensate_into, round_stochastic_into
from lightning_memsave.optim.split_weights import BLOCK, draw_correction, join, split_into

__all__ = ["Kahan", "Masters", "Split", "Stochastic", "first_write", "joined_on_host", "make_masters"]

_SEED = 0x6D77  # the same on every rank


class Masters(Protocol):
    """How fp32 values become a bf16 weight and what is kept with it (its rest), and back.

    Attributes:
        key: Name of the rest in the state of an optimizer; empty where nothing is kept.
        dtype: Of the rest.

    """

    key: str
    dtype: torch.dtype | None

    def read(self, weight: Tensor, rest: Tensor | None) -> Tensor:
        """Return the fp32 values, in a new tensor."""

    def write(self, values: Tensor, weight: Tensor, rest: Tensor | None) -> None:
        """Write fp32 values into the weight and its rest, in place; ``values`` may be used as scratch space."""

    def draw(self, weight: Tensor) -> Tensor | None:
        """Return a rest for a weight whose fp32 values are not known: somewhere in its rounding cell."""

    def advance(self) -> None:
        """Begin a step of an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return what chance depends on, so that a resumed run rounds as the uninterrupted one does."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""


class Stochastic:
    """Round by chance; see ``round_stochastic_into``."""

    key = ""
    dtype: torch.dtype | None = None

    def __init__(self) -> None:
        self.rounder = Rounder()

    def read(self, weight: Tensor, rest: Tensor | None) -> Tensor:
        """Return the weight in fp32."""
        return weight.float()

    def write(self, values: Tensor, weight: Tensor, rest: Tensor | None) -> None:
        """Round each value to one of its two neighbours."""
        round_stochastic_into(values, weight, self.rounder.generator(values.device))

    def draw(self, weight: Tensor) -> Tensor | None:
        """Return nothing: nothing is kept."""
        return None

    def advance(self) -> None:
        """Do nothing: the generators count."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generators."""
        return self.rounder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the generators; what another way has counted is its own."""
        self.rounder.load_state_dict({key: value for key, value in state_dict.items() if isinstance(value, Tensor)})


class Split:
    """Keep an integer correction; see ``split_weights``."""

    key = "correction"

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        self.dtype: torch.dtype | None = dtype
        self.step = 0  # of the optimizers; before the first one values are rounded to the nearest
        self._generator = torch.Generator().manual_seed(_SEED)

    def read(self, weight: Tensor, rest: Tensor | None) -> Tensor:
        """Join."""
        assert rest is not None
        return join(weight, rest)

    def write(self, values: Tensor, weight: Tensor, rest: Tensor | None) -> None:
        """Split."""
        assert rest is not None
        split_into(values, weight, rest, self.step or None)

    def draw(self, weight: Tensor) -> Tensor | None:
        """Return corrections drawn uniformly."""
        assert self.dtype is not None
        return draw_correction(weight, self.dtype, self._generator)

    def advance(self) -> None:
        """Count: chance is a hash of values and steps."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the count of steps."""
        self.step = state_dict.get("step", self.step)


class Kahan:
    """Keep what the last rounding lost, in bf16."""

    key = "compensation"
    dtype: torch.dtype | None = torch.bfloat16

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)

    def read(self, weight: Tensor, rest: Tensor | None) -> Tensor:
        """Add the compensation."""
        assert rest is not None
        return weight.float().add_(rest)

    def write(self, values: Tensor, weight: Tensor, rest: Tensor | None) -> None:
        """Round to the nearest, and keep the difference."""
        assert rest is not None
        compensate_into(values, weight, rest)

    def draw(self, weight: Tensor) -> Tensor | None:
        """Return compensations drawn uniformly."""
        drawn = draw_correction(weight, torch.int8, self._generator)
        rest = torch.empty_like(weight)
        for w, c, out in _blocks(weight, drawn, rest):
            out.copy_(join(w, c) - w.float())
        return rest

    def advance(self) -> None:
        """Do nothing: nothing is left to chance."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def make_masters(way: str, correction: torch.dtype) -> Masters:
    """Return the way of a name: ``stochastic``, ``split`` or ``kahan``."""
    return Split(correction) if way == "split" else Kahan() if way == "kahan" else Stochastic()


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors in flat blocks side by side, or whole where one is not contiguous."""
    if not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        yield tuple(t[start : start + BLOCK] for t in flat)


def joined_on_host(masters: Masters, weight: Tensor, rest: Tensor) -> Tensor:
    """Return the fp32 values on the host; no fp32 copy appears on the device."""
    out = torch.empty_like(weight, dtype=torch.float32, device="cpu")
    for w, r, o in _blocks(weight.detach(), rest, out):
        o.copy_(masters.read(w, r))
    return out


def first_write(masters: Masters, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and the rest of fp32 values that are about to be lost; no second fp32 copy appears."""
    weight = torch.empty_like(values, dtype=torch.bfloat16)
    rest = torch.empty_like(values, dtype=masters.dtype)
    for v, w, r in _blocks(values, weight, rest):
        masters.write(v, w, r)
    return weight, rest
