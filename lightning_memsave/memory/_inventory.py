"""What a model and its optimizers hold before a step: every tensor with its category and its module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_memsave.memory._reach import tensors_in
from lightning_memsave.memory.ledger import FROZEN_WEIGHTS, GRADIENTS, OPTIMIZER_STATE, OTHER, WEIGHTS

__all__ = ["gradients_of", "module_state", "parameter_owners", "state_of"]

Held = tuple[Tensor, str, str]  # tensor, category, qualified name of the module


def parameter_owners(module: nn.Module) -> dict[int, str]:
    """Return ``id(parameter)`` -> qualified name of the first module that holds it.

    Lazy parameters that do not exist yet are left out.
    """
    owners: dict[int, str] = {}
    for name, child in module.named_modules():
        for parameter in child._parameters.values():
            if parameter is not None and not isinstance(parameter, UninitializedParameter):
                owners.setdefault(id(parameter), name)
    return owners


def module_state(module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[Held]:
    """Yield parameters, what quantized ones carry, buffers, and the plain tensors of modules, in this order."""
    # Not those an optimizer merely lists: AdamW(self.parameters()) lists the frozen base of a LoRA model too.
    trained = {id(p) for optimizer in optimizers for p, state in optimizer.state.items() if state}
    for name, child in module.named_modules():
        for parameter in child._parameters.values():
            if parameter is not None and not isinstance(parameter, UninitializedParameter):
                trains = parameter.requires_grad or id(parameter) in trained
                yield parameter, WEIGHTS if trains else FROZEN_WEIGHTS, name
                for tensor in tensors_in(list(parameter.__dict__.values())):
                    yield tensor, FROZEN_WEIGHTS, name
        for buffer in child._buffers.values():
            if buffer is not None:
                yield buffer, FROZEN_WEIGHTS, name
    for name, child in module.named_modules():
        for key, value in child.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                for tensor in tensors_in(value, enter=_is_quantization_state):
                    yield tensor, OTHER, name


def gradients_of(parameters: Iterable[Tensor], owners: dict[int, str]) -> Iterator[Held]:
    """Yield the gradients that parameters hold."""
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad, GRADIENTS, owners.get(id(parameter), "")


def state_of(optimizer: Optimizer, owners: dict[int, str]) -> Iterator[Held]:
    """Yield the tensors of an optimizer's state."""
    for parameter, state in list(optimizer.state.items()):
        for tensor in tensors_in(state):
            if tensor is not parameter and tensor is not getattr(parameter, "grad", None):
                yield tensor, OPTIMIZER_STATE, owners.get(id(parameter), "")


def _is_quantization_state(value: Any) -> bool:
    return type(value).__module__.startswith(("bitsandbytes.", "torchao."))
