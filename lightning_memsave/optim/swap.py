"""Replace the optimizers that a ``configure_optimizers`` returned, in any of its forms.

The returned structure is kept as it is; optimizers in it are exchanged and everything that points to an old one
(schedulers, schedulers inside schedulers, attributes of the module) is pointed to the new one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memsave._match import Patterns, as_patterns, match_modules
from lightning_memsave.errors import ConfigurationError, NothingToTransformError, raise_problems
from lightning_memsave.optim._notes import rule_notes, size_notes, swapped_state_bytes
from lightning_memsave.optim._rebind import rebind
from lightning_memsave.optim._refusals import refusals, sparse_problems
from lightning_memsave.optim.local_shards import step_on_local_shards
from lightning_memsave.optim.registry import OptimizerRow, family_of, group_options
from lightning_memsave.optim.state_bytes import predicted_state_bytes
from lightning_memsave.transforms._selection import head_layers

__all__ = ["Swapped", "keep_32bit_problems", "parameters_kept_32bit", "swap_optimizers"]

SUBJECT = "LowMemoryOptimizer"


@dataclass(frozen=True, kw_only=True)
class Swapped:
    """One exchange.

    Args:
        old: What ``configure_optimizers`` made.
        new: What trains.
        state_bytes_before: State of ``old`` once every parameter has stepped; ``None`` where its class is not known.
        state_bytes_after: The same of ``new``.
        notes: What the user should know: another update rule, an option without effect.

    """

    old: Optimizer
    new: Optimizer
    state_bytes_before: int | None
    state_bytes_after: int
    notes: tuple[str, ...] = ()


@dataclass
class _Swap:
    """One run over a returned structure."""

    row: OptimizerRow
    options: Mapping[str, Any]
    keep_32bit: Collection[int]
    done: dict[int, Swapped] = field(default_factory=dict)

    def exchange(self, value: Any) -> Any:
        """Return ``value`` with every optimizer in it replaced; containers keep their type and order."""
        if isinstance(value, Optimizer):
            if id(value) not in self.done:
                self.done[id(value)] = swap_one(value, self.row, self.options, self.keep_32bit)
            return self.done[id(value)].new
        if isinstance(value, dict):
            return {key: self.exchange(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self.exchange(item) for item in value)
        return value


def swap_optimizers(
    configured: Any,
    module: nn.Module,
    row: OptimizerRow,
    *,
    options: Mapping[str, Any],
    keep_32bit: Patterns,
) -> tuple[Any, list[Swapped]]:
    """Exchange every optimizer in what ``configure_optimizers`` returned; schedulers are changed in place.

    Args:
        configured: Any of the forms Lightning takes.
        module: Owns the parameters; its attributes that hold an old optimizer are pointed to the new one.
        row: What to build.
        options: Options for ``row``, already validated.
        keep_32bit: ``"auto"`` (embeddings and norms), patterns over modules, or nothing.

    Returns:
        The same structure with the new optimizers, and one entry an optimizer.

    Raises:
        ConfigurationError: If there is no optimizer, or one that cannot be replaced without changing what it does.
        NothingToTransformError: If a pattern of ``keep_32bit`` matches no module.

    """
    run = _Swap(row, options, parameters_kept_32bit(module, keep_32bit, heads=row.matrices_only))
    replaced = run.exchange(configured)
    if not run.done:
        raise ConfigurationError(
            f"{SUBJECT}: configure_optimizers returned {type(configured).__name__} with no torch.optim.Optimizer in "
            "it. Return one, e.g. torch.optim.AdamW(self.parameters(), lr=1e-4)."
        )
    raise_problems(SUBJECT, sparse_problems(module, [swapped.old for swapped in run.done.values()], row))
    new = {old: swapped.new for old, swapped in run.done.items()}
    rebind(replaced, new)
    owned = {
        k: v for k, v in module.__dict__.items() if not k.startswith("_") and isinstance(v, (Optimizer, list, dict))
    }
    for name, value in owned.items():
        if id(value) in run.done and isinstance(value, Optimizer):
            setattr(module, name, run.done[id(value)].new)
        elif not isinstance(value, Optimizer):
            rebind(value, new)
    unread = keep_32bit and keep_32bit != "auto" and row.bits == 32 and row.reaches is None
    note = (f"keep_32bit has no effect: all state of {row.name} is 32-bit",) if unread else ()
    return replaced, [replace(swapped, notes=(*swapped.notes, *note)) for swapped in run.done.values()]


def parameters_kept_32bit(module: nn.Module, keep_32bit: Patterns, *, heads: bool = False) -> set[int]:
    """Return the ids of the parameters whose state stays fp32.

    Args:
        module: Searched with all its submodules; a parameter shared with a matched module is kept as well.
        keep_32bit: ``"auto"``: embeddings and everything called a norm; else patterns over modules.
        heads: ``"auto"`` means the layers that make the outputs as well.

    """
    if keep_32bit == "auto":
        outputs = head_layers(module) if heads else set()
        owners = [
            m
            for name, m in module.named_modules()
            if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) or _is_norm(m) or name in outputs
        ]
        return {id(p) for owner in owners for p in owner.parameters(recurse=False)}
    if not keep_32bit:
        return set()
    patterns = as_patterns(keep_32bit, subject=SUBJECT)
    try:
        matched = match_modules(module, patterns, subject=SUBJECT)
    except NothingToTransformError as error:
        raise NothingToTransformError(str(error).replace("modules=", "keep_32bit=")) from None
    return {id(p) for _, owner in matched for p in owner.parameters()}


def keep_32bit_problems(keep_32bit: object) -> list[str]:
    """Return what is wrong with the argument, before there is a module to match it against."""
    patterns = [keep_32bit] if isinstance(keep_32bit, str) else keep_32bit
    if isinstance(patterns, (list, tuple)) and all(isinstance(pattern, str) and pattern for pattern in patterns):
        return []
    return [
        f'keep_32bit={keep_32bit!r} selects no modules. Write "auto" (embeddings and norms), a glob or class name, a '
        "list of them, or [] for none."
    ]


def _is_norm(module: nn.Module) -> bool:
    return any("norm" in cls.__name__.lower() for cls in type(module).__mro__ if cls is not nn.Module)


def swap_one(old: Optimizer, row: OptimizerRow, options: Mapping[str, Any], keep_32bit: Collection[int]) -> Swapped:
    """Build the new optimizer with the groups of the old one."""
    sharded = any(isinstance(p, DTensor) for group in old.param_groups for p in group["params"])
    already = type(old).__name__ == row.title and type(old).__module__.split(".")[0] == row.library
    if already and sharded and row.local_shards:
        raise ConfigurationError(
            f"{SUBJECT}: configure_optimizers made {row.title} of sharded (DTensor) parameters, on which it cannot "
            "step by itself. Return torch.optim.AdamW(...) there and leave the replacement to LowMemoryOptimizer."
        )
    if already and not sharded:
        return Swapped(
            old=old,
            new=old,
            state_bytes_before=None,
            state_bytes_after=swapped_state_bytes(old, row, options, keep_32bit),
            notes=(f"configure_optimizers already made {row.title}; left as it is",),
        )
    raise_problems(SUBJECT, refusals(old, row))
    same_rule = family_of(old) == row.family
    groups = [_group(group, old, row, options, same_rule) for group in old.param_groups]
    new = row.build(groups, options, keep_32bit)
    if sharded:
        step_on_local_shards(new, row.blocks)
    _move_hooks(old, new)
    return Swapped(
        old=old,
        new=new,
        state_bytes_before=predicted_state_bytes(old),
        state_bytes_after=swapped_state_bytes(new, row, options, keep_32bit),
        notes=(*rule_notes(old, row, same_rule), *size_notes(new, row, options, keep_32bit)),
    )


def _group(
    group: Mapping[str, Any], old: Optimizer, row: OptimizerRow, options: Mapping[str, Any], same_rule: bool
) -> dict[str, Any]:
    """Keep the parameters, what means the same, and everything the old optimizer did not define itself.

    ``betas`` and ``momentum`` stay in the group even where the new optimizer does not read them: schedulers that
    cycle them do.
    """
    kept = {"params", "lr", "weight_decay", *(row.shared if same_rule else ())}
    copied = {key: value for key, value in group.items() if key in kept or key not in old.defaults}
    unread = {"betas", "momentum"} - set(row.options) if "betas" not in row.options else {"momentum"}
    copied |= {key: group[key] for key in sorted(unread) if group.get(key)}
    copied |= row.carry(old, group) if row.carry is not None else {}
    if row.maximizes:
        copied["maximize"] = group.get("maximize", False)
    copied |= group_options(options)
    copied["params"] = list(group["params"])
    return copied


def _move_hooks(old: Optimizer, new: Optimizer) -> None:
    """Give the step hooks a user put on the old optimizer to the new one, and count steps for its schedulers."""
    for hook in getattr(old, "_optimizer_step_pre_hooks", {}).values():
        new.register_step_pre_hook(hook)
    for hook in getattr(old, "_optimizer_step_post_hooks", {}).values():
        new.register_step_post_hook(hook)
    if hasattr(old.step, "_wrapped_by_lr_sched"):
        _mark_step(new)


def _mark_step(optimizer: Optimizer) -> None:
    """Do what a scheduler's constructor does to an optimizer: without it the first scheduler step warns."""
    function = optimizer.step.__func__  # type: ignore[attr-defined]

    @functools.wraps(function)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self._opt_called = True  # type: ignore[attr-defined]
        return function(self, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
