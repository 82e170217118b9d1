"""Run an optimizer's own step on other tensors: a twin that shares its class and options, not its parameters.

The optimizer itself is not touched meanwhile, so a step may run in another thread, and an exception leaves it whole.
"""

from __future__ import annotations

import inspect
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.errors import ConfigurationError

__all__ = ["SUBJECT", "Position", "Stepped", "commit", "offload_problems", "raw_step", "step_on"]

SUBJECT = "OptimizerOffload"

Position = tuple[int, int]  # group, parameter in the group

# class name -> why one parameter (or one bucket of them) cannot be stepped without the others
_BY_NAME = {
    "LBFGS": "evaluates the closure several times in a step and keeps one history for all parameters",
    "ZeroRedundancyOptimizer": "already splits its state over the ranks; pass the optimizer it wraps",
    "DeepSpeedCPUAdam": "already keeps its state on the host",
}
_SHARES_STATE = ("schedulefree", "prodigy", "dadapt")
# torch's classes with a fused kernel for the CPU
_FUSED_ON_CPU = frozenset({torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad})
# Options that make a step look at the norm of all gradients.
_GLOBAL_NORMS = ("max_grad_norm", "pre_norm", "global_clip_norm")
_OWN = frozenset({"param_groups", "state", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"})


def offload_problems(optimizer: Optimizer) -> list[str]:
    """Return one sentence for every reason why an optimizer cannot be stepped on the host a bucket at a time."""
    name = type(optimizer).__name__
    problems = []
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _BY_NAME:
            problems.append(f"{cls.__name__} {_BY_NAME[cls.__name__]}. Remove {SUBJECT} from the callbacks.")
            break
    place = f"{type(optimizer).__module__}.{name}".lower().replace("_", "")
    if any(word in place for word in _SHARES_STATE):
        problems.append(
            f"{name} keeps values in its param groups that all parameters share and every step changes. "
            "Use torch.optim.AdamW or another optimizer with state per parameter only."
        )
    closure = inspect.signature(raw_step(optimizer)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty and "LBFGS" not in name:
        problems.append(f"{name} needs a closure to evaluate the loss again. Remove {SUBJECT} from the callbacks.")
    if getattr(optimizer, "is_paged", False):
        problems.append(
            f"{name} pages its state between the device and the host itself. Use the class without 'paged', "
            f"or remove {SUBJECT}."
        )
    for index, group in enumerate(optimizer.param_groups):
        problems += [
            f"param group {index} of {name} has {key}=True, which needs its state on the device. Write {key}=False."
            for key in ("capturable", "differentiable")
            if group.get(key)
        ]
        problems += [
            f"{name} takes the norm of all gradients (param group {index} has {key}={group[key]!r}). Turn it off, and "
            "clip with Trainer(gradient_clip_val=...)."
            for key in _GLOBAL_NORMS
            if group.get(key)
        ]
        if isinstance(group.get("lr"), Tensor) and group["lr"].device.type != "cpu":
            problems.append(f"param group {index} of {name} has its lr on the device. Write lr=float(...).")
    wrapper = optimizer.__dict__.get("step")
    if wrapper is not None and not hasattr(wrapper, "_wrapped_by_lr_sched"):
        problems.append(
            f"the step of this {name} was replaced on the instance (by {wrapper.__module__}), and stepping on the host "
            f"would skip that. Put {SUBJECT} before what replaces it, or remove one of them."
        )
    return problems


def raw_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Return the step of the class without torch's hooks around it."""
    step: Any = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """What a step on a part of the parameters did.

    Args:
        states: State of every position that has one now.
        groups: What it changed in each param group.
        attributes: What it changed on the optimizer.

    """

    states: dict[Position, dict[str, Any]]
    groups: list[dict[str, Any]]
    attributes: dict[str, Any]


def step_on(
    optimizer: Optimizer,
    tensors: Mapping[Position, Tensor],
    states: Mapping[Position, dict[str, Any]],
    *,
    fuse: bool = False,
) -> Stepped:
    """Step tensors with the rule and the options of an optimizer, which is not changed.

    Args:
        optimizer: Gives class, options and everything else it holds.
        tensors: What to step instead of the parameters at these positions, each with its ``grad``.
        states: Their state so far, changed in place; missing for none.
        fuse: Use torch's fused kernel for the CPU where the groups leave the choice open.

    Raises:
        ConfigurationError: If the optimizer keeps state that belongs to no parameter.

    """
    groups = [_group(optimizer, index, tensors, fuse) for index in range(len(optimizer.param_groups))]
    before = [dict(group) for group in groups]
    twin = object.__new__(type(optimizer))
    twin.__dict__.update({key: _rebound(value, optimizer, twin) for key, value in optimizer.__dict__.items()})
    twin.__dict__.pop("step", None)
    twin._optimizer_step_pre_hooks = OrderedDict()  # a class whose step calls that of its parent would run them again
    twin._optimizer_step_post_hooks = OrderedDict()
    twin.param_groups = groups
    twin.state = defaultdict(dict, {tensors[at]: state for at, state in states.items()})
    raw_step(optimizer)(twin)
    known = {id(tensor) for tensor in tensors.values()} | {id(_ABSENT)}
    foreign = [str(key) for key in twin.state if id(key) not in known]
    if foreign:
        raise _shared(optimizer, foreign)
    return Stepped(
        states={at: twin.state[tensor] for at, tensor in tensors.items() if tensor in twin.state},
        groups=[
            {key: value for key, value in new.items() if key != "params" and not _same(old.get(key, _NOTHING), value)}
            for old, new in zip(before, groups)
        ],
        attributes={
            key: value
            for key, value in twin.__dict__.items()
            if key not in _OWN
            and not isinstance(value, types.MethodType)
            and not _same(optimizer.__dict__.get(key, _NOTHING), value)
        },
    )


def commit(optimizer: Optimizer, parts: Sequence[Stepped]) -> None:
    """Change the optimizer as one whole step would have: a counter that every part advanced advances once.

    Raises:
        ConfigurationError: If the parts did not agree, because a value depends on all parameters together.

    """
    if not parts:
        return
    first = parts[0]
    for part in parts[1:]:
        differing = [
            key
            for one, other in zip([*first.groups, first.attributes], [*part.groups, part.attributes])
            for key in {**one, **other}
            if not _same(one.get(key, _NOTHING), other.get(key, _NOTHING))
        ]
        if differing:
            raise _shared(optimizer, differing)
    for group, changed in zip(optimizer.param_groups, first.groups):
        group.update(changed)
    optimizer.__dict__.update(first.attributes)


def _shared(optimizer: Optimizer, names: Sequence[str]) -> ConfigurationError:
    name = type(optimizer).__name__
    return ConfigurationError(
        f"{SUBJECT}: the step of {name} keeps {', '.join(dict.fromkeys(names))}, which depends on all parameters "
        "together, so it cannot be stepped in parts. Use an optimizer with state per parameter only, e.g. "
        f"torch.optim.AdamW, or remove {SUBJECT}."
    )


_NOTHING = object()
_ABSENT = torch.empty(0, dtype=torch.float32, device="cpu")  # stands for a parameter that has no gradient


def _group(optimizer: Optimizer, index: int, tensors: Mapping[Position, Tensor], fuse: bool) -> dict[str, Any]:
    # Positions are kept: some optimizers know their parameters by them.
    group = optimizer.param_groups[index]
    stepped = [tensors.get((index, i), _ABSENT) for i in range(len(group["params"]))]
    copied = {**group, "params": stepped}
    if fuse and type(optimizer) in _FUSED_ON_CPU and group.get("fused") is None and group.get("foreach") is None:
        dtypes = {dtype for t in stepped if t.grad is not None for dtype in (t.dtype, t.grad.dtype)}
        if all(dtype.is_floating_point for dtype in dtypes):
            copied["fused"] = True
    return copied


def _rebound(value: Any, old: Optimizer, new: Optimizer) -> Any:
    if isinstance(value, types.MethodType) and value.__self__ is old:
        return types.MethodType(value.__func__, new)
    return value


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and bool(torch.equal(old, new))
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return False
    return bool(old == new)
