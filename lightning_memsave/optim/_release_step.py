"""Step an optimizer on one parameter, leaving everything else of it as an ordinary step would find it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.errors import ConfigurationError

__all__ = ["ParameterStepper", "release_problems"]

_INSTEAD = "Remove GradientRelease, or return torch.optim.AdamW from configure_optimizers."
# Prefixes of class names, lower case and without underscores -> why a step needs all gradients at once.
_BY_NAME = {
    "lbfgs": "it evaluates the closure several times in a step and works on one vector of all gradients",
    "schedulefree": "it averages the weights with state of its param groups that advances once in a step",
    "prodigy": "it estimates the learning rate from the gradients of all parameters",
    "dadapt": "it estimates the learning rate from the gradients of all parameters",
    "zeroredundancyoptimizer": "it gives whole parameters to ranks and broadcasts them in every step",
}
# Options of a group or a constructor that, when set, make a step look at the norm of all gradients.
_GLOBAL_NORMS = ("max_grad_norm", "pre_norm", "global_clip_norm")
_NO_HOOKS: OrderedDict[int, Any] = OrderedDict()
_NUMBERS = (int, float)
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")  # a parameter without a gradient


def release_problems(optimizer: Any) -> list[str]:
    """Return why an optimizer cannot be stepped one parameter at a time: nothing, or one sentence a reason."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        return [f"{name} is not a torch.optim.Optimizer. Return one from configure_optimizers."]
    reason = _reason_by_name(type(optimizer))
    if reason is not None:
        return [f"{name} cannot be stepped one parameter at a time: {reason}. {_INSTEAD}"]
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return [f"{name} cannot be stepped inside backward: its step evaluates the loss again. {_INSTEAD}"]
    problems = []
    keys: list[object] = list(optimizer.state)
    if not all(isinstance(key, Tensor) for key in keys):
        problems.append(_shared_state(name))
    for index, group in enumerate(optimizer.param_groups):
        norms = [key for key in _GLOBAL_NORMS if group.get(key)]
        if norms:
            problems.append(
                f"{name} takes the norm of all gradients (param group {index} has {norms[0]}={group[norms[0]]!r}). "
                f"Turn it off, and clip with Trainer(gradient_clip_val=...) and clip='two_pass'."
            )
        if group.get("differentiable"):
            problems.append(f"param group {index} asks for differentiable=True, which needs every gradient to stay.")
    return problems


def _reason_by_name(cls: type) -> str | None:
    for base in cls.__mro__:
        name = base.__name__.lower().replace("_", "")
        for start, reason in _BY_NAME.items():
            if name.startswith(start) or (start == "schedulefree" and start in name):
                return reason
    return None


def _shared_state(name: str) -> str:
    return (
        f"{name} keeps state that belongs to no parameter, so a step on one parameter changes that of the others. "
        f"{_INSTEAD}"
    )


class ParameterStepper:
    """Call ``optimizer.step()`` so that it sees one parameter only.

    The optimizer stays the user's own object: its state, its groups (found anew at each step) and whatever wraps its
    ``step`` on the instance. What is meant to happen once in a step happens once: step hooks run around the ordinary
    ``optimizer.step`` alone, and counters that an optimizer keeps in a group advance there.

    Args:
        optimizer: Stepped; nothing is installed on it but one post hook, until ``close``.

    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        # bitsandbytes finds a parameter's configuration by its place in the groups: every place must stay.
        self._keeps_places = any(cls.__name__ == "Optimizer8bit" for cls in type(optimizer).__mro__)
        if self._keeps_places:
            _finish_first_step(optimizer)
        self._counters: dict[tuple[int, str], tuple[MutableMapping[str, Any], str, Any]] = {}
        self._handle = optimizer.register_step_post_hook(self._advance)

    def step(self, p: Tensor, place: tuple[int, int]) -> None:
        """Step on ``p``.

        Args:
            p: A parameter of the optimizer.
            place: Where it is: its group in ``optimizer.param_groups``, and its place in that group's ``params``.

        Raises:
            ConfigurationError: If the step changed what belongs to all parameters.

        """
        optimizer = self.optimizer
        groups = optimizer.param_groups
        group = groups[place[0]]
        params = [g["params"] for g in groups] if self._keeps_places else [group["params"]]
        hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        before, own = _values(group), _numbers(optimizer)
        optimizer._optimizer_step_pre_hooks = optimizer._optimizer_step_post_hooks = _NO_HOOKS
        try:
            if self._keeps_places:
                for other in groups:
                    other["params"] = []
                group["params"] = [_NOTHING] * place[1] + [p]
            else:
                group["params"], optimizer.param_groups = [p], [group]
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            for narrowed, whole in zip(groups if self._keeps_places else [group], params, strict=True):
                narrowed["params"] = whole
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks
        self._settle(group, before, _values(group))
        self._settle(optimizer.__dict__, own, _numbers(optimizer))

    def close(self) -> None:
        """Take the hook off; a second call does nothing."""
        self._handle.remove()

    # -- what belongs to all parameters ---------------------------------------------------------------------------
    def _settle(self, owner: MutableMapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Take a counter back, so that the next parameter is stepped with the same number; refuse anything else."""
        if after == before:
            return
        for key, value in after.items():
            old = before.get(key, 0)
            if value == before.get(key, _MISSING):
                continue
            if type(value) is not int or type(old) is not int or value != old + 1:
                raise ConfigurationError(
                    f"GradientRelease: {_shared_state(type(self.optimizer).__name__)} Changed by a step on one "
                    f"parameter: {key!r}, {old!r} -> {value!r}."
                )
            if key in before:
                owner[key] = old
            else:
                del owner[key]
            self._counters[id(owner), key] = owner, key, value

    def _advance(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Advance the counters with the step that ends the backward, whether or not the optimizer did so itself."""
        while self._counters:
            owner, key, value = self._counters.popitem()[1]
            owner[key] = value


def _finish_first_step(optimizer: Any) -> None:
    """Do what bitsandbytes' first step does with all groups, before it sees only one parameter of them."""
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True


class _Missing:
    """A value that equals nothing."""


_MISSING = _Missing()


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's values in a form whose comparison is cheap: tensors by identity and version."""
    return {
        key: (id(value), value._version) if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def _numbers(optimizer: Optimizer) -> dict[str, Any]:
    return {key: value for key, value in optimizer.__dict__.items() if type(value) in _NUMBERS}
