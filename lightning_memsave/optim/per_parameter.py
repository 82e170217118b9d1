"""The base of our own optimizers: one parameter after the other, in blocks, with state that loads as it was saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError
from lightning_memsave.optim.local_shards import whole

__all__ = ["PerParameterOptimizer", "block_values", "compute_dtype", "flat_blocks"]

_BLOCK_ON_CPU = 2**20  # fits a cache
_BLOCK_ON_ACCELERATOR = 2**22  # large enough to hide the launch of a kernel


def block_values(p: Tensor) -> int:
    """Return how many values of ``p`` are updated at a time: the temporaries of a step are a few blocks in fp32."""
    return _BLOCK_ON_CPU if p.device.type == "cpu" else _BLOCK_ON_ACCELERATOR


def flat_blocks(p: Tensor) -> Iterator[slice]:
    """Yield slices that cover the values of ``p``; each starts at a multiple of 256."""
    size = block_values(p)
    for start in range(0, p.numel(), size):
        yield slice(start, min(start + size, p.numel()))


def compute_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the state and the arithmetic: fp32, and fp64 for fp64 parameters."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class PerParameterOptimizer(Optimizer):
    """Step each parameter by itself.

    A step looks at the parameters of the current ``param_groups`` only, one at a time: no state belongs to a group.
    The arithmetic is fp32 whatever the dtype of the parameter, and so is the state; a checkpoint loads in the dtypes
    it was saved in. Parameters and gradients that are not contiguous are copied for their update.

    Args:
        params: Parameters or groups.
        defaults: The hyper-parameters of a group.
        keep_32bit: ``id`` of the parameters that are to be stepped by plain AdamW.

    """

    # A copied or unpickled optimizer goes by the state it holds.
    _kept: frozenset[int] = frozenset()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], keep_32bit: Collection[int] = ()) -> None:
        self._kept = frozenset(keep_32bit)
        super().__init__(params, {**defaults, "maximize": False})

    @abstractmethod
    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return the state of a parameter before its first step, all but ``step``."""

    @abstractmethod
    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Change a contiguous parameter in place; ``state["step"]`` is 1 in the first step."""

    def keeps_32bit(self, p: Tensor) -> bool:
        """Return whether a parameter was named to be stepped by plain AdamW."""
        return id(whole(p)) in self._kept

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the loss again; called once, before the update.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: Tensor, group: Mapping[str, Any]) -> None:
        gradient = p.grad
        if gradient is None or p.numel() == 0:
            return
        state = self.state[p]
        if not state:
            self._check(p, gradient)
            state.update(step=0, **self.new_state(p, group, p.device))
        state["step"] += 1
        gradient = gradient.detach().contiguous()
        if group["maximize"]:
            gradient = gradient.neg()
        work = p.detach().contiguous()
        self.update(work, gradient, state, group)
        if work.data_ptr() != p.data_ptr():
            p.copy_(work)

    def _check(self, p: Tensor, gradient: Tensor) -> None:
        name = type(self).__name__
        if isinstance(p, DTensor):
            raise ConfigurationError(f"{name} cannot step on a sharded (DTensor) parameter. Use torch.optim.AdamW.")
        if not p.is_floating_point():
            raise ConfigurationError(f"{name} updates real floating-point parameters; found {p.dtype}.")
        if gradient.layout != torch.strided:
            raise ConfigurationError(f"{name} does not read sparse gradients. Write sparse=False in the embedding.")

    # -- checkpoints ------------------------------------------------------------------------------------------------
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, each tensor in the dtype it was saved in.

        Raises:
            CheckpointMismatchError: If it is the state of another optimizer, or of other parameters.

        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        owners = [(p, index) for index, group in enumerate(self.param_groups) for p in group["params"]]
        saved = {
            p: (state_dict["state"][key], state_dict["param_groups"][index])
            for key, (p, index) in zip(keys, owners, strict=False)  # torch says what is wrong with other groups
            if key in state_dict["state"] and index < len(state_dict["param_groups"])
        }
        missing = {key for group in state_dict["param_groups"] for key in set(self.defaults) - set(group)}
        for p, (entry, group) in saved.items():
            self._check_state(entry, p, {**self.defaults, **group})
        missing -= {"maximize", "differentiable"}  # torch adds the second to the defaults of what was loaded into
        if missing:
            raise CheckpointMismatchError(
                f"LowMemoryOptimizer: the checkpoint holds another optimizer: its groups have no "
                f"{', '.join(sorted(missing))}, which {type(self).__name__} needs. {_WAY_OUT}"
            )
        # torch would cast every moment to the dtype of its parameter
        super().load_state_dict({**state_dict, "state": {}})
        for p, (entry, _) in saved.items():
            state = {key: _placed(value, p.device) for key, value in entry.items()}
            self.state[p] = {**state, "step": int(state["step"])}

    def _check_state(self, found: Mapping[str, Any], p: Tensor, group: Mapping[str, Any]) -> None:
        expected = _shapes({"step": 0, **self.new_state(p, group, torch.device("meta"))})
        if _shapes(found) != expected:
            raise CheckpointMismatchError(
                f"LowMemoryOptimizer: the checkpoint holds optimizer state {_said(_shapes(found))}, and "
                f"{type(self).__name__} needs {_said(expected)} for a parameter of shape {tuple(p.shape)}. {_WAY_OUT}"
            )


_WAY_OUT = (
    "Resume with the optimizer and options the checkpoint was written with, or start from its weights alone "
    "(load_from_checkpoint, then fit without ckpt_path)."
)


def _placed(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) if isinstance(value, Tensor) else () for key, value in state.items()}


def _said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key!r} {list(shape)}" if shape else repr(key) for key, shape in sorted(shapes.items()))
