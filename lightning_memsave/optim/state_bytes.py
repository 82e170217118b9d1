"""Bytes of optimizer state: what is held now, and what will be held once every parameter has stepped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.optim._shard_checkpoint import local_part

__all__ = ["held_state_bytes", "predicted_state_bytes", "trainable_parameters"]


def trainable_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups that ask for a gradient now."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def held_state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state on this rank, each storage once."""
    storages = {s.data_ptr(): s.nbytes() for s in _storages(optimizer.state.values()) if s.nbytes()}
    return sum(storages.values())


def _storages(value: Any) -> Iterable[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield local_part(value).untyped_storage()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _storages(item)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _storages(item)


def _step_bytes() -> int:
    # torch keeps one host scalar a parameter, in double precision where that is the default dtype
    return 8 if torch.get_default_dtype() == torch.float64 else 4


def _adam(p: Tensor, group: Mapping[str, Any]) -> int:
    return (3 if group.get("amsgrad") else 2) * p.nbytes + _step_bytes()


def _sgd(p: Tensor, group: Mapping[str, Any]) -> int:
    return p.nbytes if group["momentum"] else 0


def _rmsprop(p: Tensor, group: Mapping[str, Any]) -> int:
    return (1 + bool(group["momentum"]) + bool(group["centered"])) * p.nbytes + _step_bytes()


def _adafactor(p: Tensor, group: Mapping[str, Any]) -> int:
    if p.ndim < 2:
        return p.nbytes + _step_bytes()
    factors = p.numel() // max(p.shape[-1], 1) + p.numel() // max(p.shape[-2], 1)
    return factors * p.element_size() + _step_bytes()


# torch's own optimizers: bytes of state for one parameter with the options of its group
_FORMULAS: dict[type[Optimizer], Callable[[Tensor, Mapping[str, Any]], int]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adamax: lambda p, _: 2 * p.nbytes + _step_bytes(),
    torch.optim.RAdam: lambda p, _: 2 * p.nbytes + _step_bytes(),
    torch.optim.NAdam: lambda p, _: 2 * p.nbytes + 2 * _step_bytes(),
    torch.optim.Adadelta: lambda p, _: 2 * p.nbytes + _step_bytes(),
    torch.optim.Adagrad: lambda p, _: p.nbytes + _step_bytes(),
    torch.optim.Rprop: lambda p, _: 2 * p.nbytes + _step_bytes(),
    torch.optim.RMSprop: _rmsprop,
    torch.optim.SGD: _sgd,
    torch.optim.Adafactor: _adafactor,
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9
    _FORMULAS[torch.optim.Muon] = lambda p, _: p.nbytes


def predicted_state_bytes(optimizer: Optimizer) -> int | None:
    """Return the bytes of state of one of torch's optimizers on this rank, after every trainable parameter has stepped.

    Returns:
        ``None`` for a class whose state is not known here.

    """
    formula = _FORMULAS.get(type(optimizer))
    if formula is None:
        return None
    # Adagrad makes its state in the constructor, for frozen parameters too
    everything = isinstance(optimizer, torch.optim.Adagrad)
    return sum(
        formula(local_part(p), group)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad or everything
    )
