"""One run on bf16 weights: the cast, the hooks on the optimizers, and what goes into checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memsave.callbacks._session import hook_instance
from lightning_memsave.errors import raise_problems
from lightning_memsave.optim.master_step import MasterStep, step_problems
from lightning_memsave.optim.master_weights import first_write, joined_on_host, make_masters
from lightning_memsave.optim.split_master import SplitMasterAdamW
from lightning_memsave.optim.split_weights import attach_correction, correction_of
from lightning_memsave.transforms.bf16 import Cast, cast_to_bf16
from lightning_memsave.units import format_bytes

__all__ = ["BF16Run"]

_JOINED = "_memsave_joined"


class BF16Run:
    """From the cast of a model to the end of its run.

    Args:
        way: ``stochastic``, ``split`` or ``kahan``.
        correction: Dtype of the corrections of ``split``.

    """

    def __init__(self, way: str, correction: torch.dtype) -> None:
        self.way = way
        self.masters = make_masters(way, correction)
        self.module: Any = None
        self.steps: list[MasterStep] = []
        self.own: list[SplitMasterAdamW] = []

    # -- the cast -----------------------------------------------------------------------------------------------------
    def cast(self, module: Any, keep_fp32: Sequence[str]) -> str:
        """Cast a model in place and return the line that says what was done."""
        self.module = module
        waiting: list[tuple[nn.Parameter, Tensor]] = []

        def keep(p: nn.Parameter, values: Tensor) -> Tensor:
            weight, rest = first_write(self.masters, values)
            waiting.append((p, rest))
            return weight

        cast = cast_to_bf16(module, keep_fp32, keep if self.masters.key else None)
        # Values that came from a bf16 file have no rest: in the middle of their cells they would lag behind.
        drawn = bool(waiting) and not any(bool(rest.any()) for _, rest in waiting)
        for p, rest in waiting:
            own = self.masters.draw(p.detach()) if drawn else rest
            assert own is not None
            attach_correction(p, own)
        return self._line(cast, sum(rest.nbytes for _, rest in waiting), drawn)

    def _line(self, cast: Cast, rest_bytes: int, drawn: bool) -> str:
        shown = ", ".join(cast.kept[:3]) + (", ..." if len(cast.kept) > 3 else "")
        parts = [
            f"{len(cast.trained)} trainable and {cast.frozen} frozen tensors cast to bf16",
            f"{len(cast.kept)} modules kept fp32 ({shown})" if cast.kept else "no module kept fp32",
            f"weights {format_bytes(cast.bytes_before)} -> {format_bytes(cast.bytes_after)}"
            + (f" and {format_bytes(rest_bytes)} of {self.masters.key}s" if rest_bytes else ""),
        ]
        unknown = sum(correction_of(p) is None for p in cast.known) if self.masters.key else 0
        if drawn or unknown:
            parts.append(
                f"the fp32 values of {len(cast.trained) if drawn else unknown} tensors are not known (bf16 already): "
                f"each {self.masters.key} is drawn from its rounding cell"
            )
        if not cast.trained and not cast.known:
            parts.append("no effect on training: no trainable tensor is bf16")
        return "; ".join(parts)

    # -- the optimizers -----------------------------------------------------------------------------------------------
    def connect(self, optimizers: Sequence[Optimizer]) -> str:
        """Hook the optimizers that step bf16 weights, and return the line that says how, or nothing.

        Raises:
            ConfigurationError: If one cannot step this way.

        """
        raise_problems("BF16Precision", [text for optimizer in optimizers for text in self._problems(optimizer)])
        for optimizer in optimizers:
            if isinstance(optimizer, SplitMasterAdamW):
                self.own.append(optimizer)
            elif any(p.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"]):
                self.steps.append(MasterStep(optimizer, self.masters))
        names = [f"{type(s.optimizer).__name__} steps fp32 copies of bf16 weights ({self.way})" for s in self.steps]
        names += [f"{type(o).__name__} steps the split weights itself" for o in self.own]
        return "; ".join(names)

    def _problems(self, optimizer: Any) -> Iterator[str]:
        if not isinstance(optimizer, SplitMasterAdamW):
            yield from step_problems(optimizer)
        elif self.way != "split":
            yield (
                f"adamw_split_master keeps split weights, and weights={self.way!r} was asked for. Write "
                'BF16Precision("split"), or LowMemoryOptimizer("adamw_8bit").'
            )
        elif optimizer.correction_dtype != self.masters.dtype:
            yield (
                f"adamw_split_master keeps {optimizer.correction_dtype} corrections, and BF16Precision made "
                f'{self.masters.dtype} ones. Write the same in both: BF16Precision("split", correction=...) and '
                'LowMemoryOptimizer("adamw_split_master", options={"correction": ...}), each "int8" or "int16".'
            )

    def _rest_of(self, p: Tensor) -> Tensor | None:
        for optimizer in (*self.own, *(step.optimizer for step in self.steps)):
            rest = optimizer.state[p].get(self.masters.key) if p in optimizer.state else None
            if isinstance(rest, Tensor):
                return rest
        return correction_of(p)

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def write_joined(self, strategy: Any) -> None:
        """Write fp32 weights into the checkpoints of a strategy, during the run and after it."""
        previous = strategy.__dict__.pop(_JOINED, None)
        if previous is not None:
            previous()
        strategy.__dict__[_JOINED] = hook_instance(strategy, "lightning_module_state_dict", self._joined)

    def _joined(self, inner: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        state = inner()
        for name, p in self.module.named_parameters(remove_duplicate=False):
            rest = self._rest_of(p)
            if rest is not None and name in state:
                state[name] = joined_on_host(self.masters, p, rest)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return what rounding by chance depends on."""
        return self.masters.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Round as the run of a checkpoint would have gone on."""
        self.masters.load_state_dict(state_dict)

    def close(self) -> None:
        """Take the hooks off the optimizers; each rest stays with its parameter. A second call does nothing."""
        for step in self.steps:
            step.close()
        for optimizer in self.own:
            for p, state in optimizer.state.items():
                if self.masters.key in state:
                    attach_correction(p, state[self.masters.key])
