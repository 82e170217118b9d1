"""Let any optimizer step bf16 weights through fp32 working copies, a few at a time.

The optimizer object, its groups, its schedulers and its state stay the user's; the state is fp32, as if the weights
were. What the way of keeping masters needs (a correction or a compensation) is one more tensor in that state.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.optim.local_shards import standing_for
from lightning_memsave.optim.master_weights import Masters
from lightning_memsave.optim.split_weights import attach_correction, correction_of, take_correction

__all__ = ["REST_KEYS", "MasterStep", "step_problems"]

REST_KEYS = ("correction", "compensation")
# fp32 values of weights (and as many of gradients) at a time
_BUCKET_ON_CPU = 2**20
_BUCKET_ON_ACCELERATOR = 2**23
# Their update of a value depends on that value's own state only, so that a tensor may be stepped in slices.
_ELEMENTWISE = {"Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
Found = tuple[tuple[int, int], Tensor]  # (group, place in the group), parameter

_NO_HOOKS: OrderedDict[int, Any] = OrderedDict()


def step_problems(optimizer: Any) -> list[str]:
    """Return why an optimizer cannot step through working copies: nothing, or one sentence a reason."""
    names = [cls.__name__.lower().replace("_", "") for cls in type(optimizer).__mro__]
    reasons = {
        "lbfgs": "it evaluates the loss several times in a step",
        "sparseadam": "it works on sparse gradients",
        "schedulefree": "it moves the weights between steps",
        "prodigy": "it looks at all parameters together",
        "dadapt": "it looks at all parameters together",
        "zeroredundancyoptimizer": "it gives whole parameters to ranks",
    }
    found = next((text for name in names for start, text in reasons.items() if start in name), None)
    if found is None:
        return []
    return [
        f"{type(optimizer).__name__} cannot step bf16 weights through fp32 copies, one parameter at a time: {found}. "
        "Return torch.optim.AdamW from configure_optimizers, or use Trainer(precision='bf16-mixed')."
    ]


@dataclass
class _Piece:
    """A parameter, or a slice of it, and the fp32 tensor that stands in for it."""

    place: tuple[int, int]
    owner: Tensor
    weight: Tensor
    rest: Tensor | None
    stand_in: Tensor


class MasterStep:
    """The hooks on one optimizer: its step, and what it loads and saves.

    Args:
        optimizer: Its ``step`` and ``load_state_dict`` are replaced on the instance, until ``close``.
        masters: How the weights keep what bf16 loses.

    """

    def __init__(self, optimizer: Optimizer, masters: Masters) -> None:
        self.optimizer, self.masters = optimizer, masters
        self.num_drawn = 0
        self._sliceable = type(optimizer).__name__ in _ELEMENTWISE and type(optimizer).__module__.startswith("torch.")
        self._inner: Callable[..., Any] = optimizer.step
        self._inner_load: Callable[..., Any] = optimizer.load_state_dict
        self._had = {name: optimizer.__dict__.get(name) for name in ("step", "load_state_dict")}
        self._widen_state()
        optimizer.step = types.MethodType(self._make_step(), optimizer)  # type: ignore[method-assign]
        optimizer.load_state_dict = self._load  # type: ignore[method-assign]
        self._handle = optimizer.register_state_dict_post_hook(self._add_waiting)

    def close(self) -> None:
        """Take the hooks off and leave each rest with its parameter too, for the next run; twice does nothing."""
        self._handle.remove()
        for name, value in self._had.items():
            if value is None:
                self.optimizer.__dict__.pop(name, None)
            else:
                self.optimizer.__dict__[name] = value
        self._had = {}
        for p in self._parameters():
            rest = self.optimizer.state.get(p, {}).get(self.masters.key)
            if rest is not None:
                attach_correction(p, rest)

    # -- the step -----------------------------------------------------------------------------------------------------
    def _make_step(self) -> Callable[..., Any]:
        @Optimizer.profile_hook_step
        def step(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.no_grad(), self._hooks_run_outside():
                self._step()
            return loss

        step.hooked = True  # type: ignore[attr-defined]
        if hasattr(self._inner, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return step

    @contextmanager
    def _hooks_run_outside(self) -> Iterator[None]:
        optimizer: Any = self.optimizer
        hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        optimizer._optimizer_step_pre_hooks = optimizer._optimizer_step_post_hooks = _NO_HOOKS
        try:
            yield
        finally:
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks

    def _step(self) -> None:
        self.masters.advance()
        groups = self.optimizer.param_groups
        found = [
            ((g, i), p)
            for g, group in enumerate(groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None and p.dtype == torch.bfloat16
        ]
        masters = {place for place, _ in found}
        others = {
            (g, i): p
            for g, group in enumerate(groups)
            for i, p in enumerate(group["params"])
            if (g, i) not in masters and p.grad is not None
        }
        counters = _Counters(self.optimizer)
        if others or not masters:
            counters.rewind()
            self._call(others)
        for bucket in self._buckets(found):
            counters.rewind()
            if len(bucket) == 1 and bucket[0][1].numel() > _bucket_size(bucket[0][1]) and self._slices(bucket[0][1]):
                self._step_in_slices(*bucket[0], counters)
            else:
                self._step_whole(bucket)

    def _call(self, shown: dict[tuple[int, int], Tensor]) -> None:
        """Call the user's step with some tensors in their places, and tensors without a gradient in the others."""
        groups = self.optimizer.param_groups
        empty = torch.empty(0, dtype=torch.float32, device="cpu")
        kept = [group["params"] for group in groups]
        for g, group in enumerate(groups):
            group["params"] = [shown.get((g, i), empty) for i in range(len(kept[g]))]
        try:
            self._inner()
        finally:
            for group, params in zip(groups, kept):
                group["params"] = params

    def _buckets(self, found: Sequence[Found]) -> Iterator[list[Found]]:
        bucket: list[Found] = []
        size = 0
        for place, p in found:
            if bucket and size + p.numel() > _bucket_size(p):
                yield bucket
                bucket, size = [], 0
            bucket.append((place, p))
            size += p.numel()
        if bucket:
            yield bucket

    def _step_whole(self, bucket: Sequence[Found]) -> None:
        optimizer = self.optimizer
        pieces = []
        for place, p in bucket:
            state, rest = self._take(p)
            stand_in = _stand_in(self.masters.read(p.detach(), rest), p.grad)
            if state:
                optimizer.state[stand_in] = state
            pieces.append(_Piece(place, p, p.detach(), rest, stand_in))
        try:
            with standing_for((piece.stand_in, piece.owner) for piece in pieces):
                self._call({piece.place: piece.stand_in for piece in pieces})
        finally:
            for piece in pieces:
                self._put(piece.owner, optimizer.state.pop(piece.stand_in, {}), piece.rest)
        for piece in pieces:
            self.masters.write(piece.stand_in.detach(), piece.owner, piece.rest)

    # -- large tensors ------------------------------------------------------------------------------------------------
    def _slices(self, p: Tensor) -> bool:
        state = self.optimizer.state.get(p, {})
        tensors = [p, p.grad, *(v for v in state.values() if isinstance(v, Tensor))]
        return self._sliceable and all(t.layout == torch.strided and t.is_contiguous() for t in tensors)  # type: ignore[union-attr]

    def _step_in_slices(self, place: tuple[int, int], p: Tensor, counters: _Counters) -> None:
        state, rest = self._take(p)
        assert p.grad is not None
        flat, gradient = p.detach().view(-1), p.grad.view(-1)
        flat_rest = None if rest is None else rest.view(-1)
        new: dict[str, Any] = dict(state)
        size = _bucket_size(p)
        try:
            for start in range(0, p.numel(), size):
                part = slice(start, min(start + size, p.numel()))
                counters.rewind()
                rest_part = None if flat_rest is None else flat_rest[part]
                stand_in = _stand_in(self.masters.read(flat[part], rest_part), gradient[part])
                if state:
                    self.optimizer.state[stand_in] = {key: _part(value, p, part) for key, value in state.items()}
                with standing_for([(stand_in, p)]):
                    self._call({place: stand_in})
                _gather(new, self.optimizer.state.pop(stand_in, {}), p, part)
                self.masters.write(stand_in.detach(), flat[part], rest_part)
        finally:
            self._put(p, new, rest)

    # -- state --------------------------------------------------------------------------------------------------------
    def _take(self, p: Tensor) -> tuple[dict[str, Any], Tensor | None]:
        """Return the optimizer's own state of a parameter, and the rest that is kept with it."""
        state = self.optimizer.state.pop(p, {})
        if not self.masters.key:
            return state, None
        rest = state.pop(self.masters.key, None)
        waiting = take_correction(p)
        if rest is None:
            rest = waiting if waiting is not None and waiting.dtype == self.masters.dtype else None
        if rest is None:
            self.num_drawn += 1
            rest = self.masters.draw(p.detach())
        return state, rest

    def _put(self, p: Tensor, state: dict[str, Any], rest: Tensor | None) -> None:
        if rest is not None:
            state[self.masters.key] = rest
        if state:
            self.optimizer.state[p] = state

    def _widen_state(self) -> None:
        """Make fp32 of state that an optimizer's constructor made in the dtype of the weights."""
        for p in self._parameters():
            state = self.optimizer.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dtype == torch.bfloat16 and p.dtype == torch.bfloat16:
                    state[key] = value.float()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def _add_waiting(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Save the rest of a parameter that has not stepped yet."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(keys, self._parameters()):
            rest = correction_of(p)
            if rest is not None and rest.dtype == self.masters.dtype and p not in optimizer.state:
                state_dict["state"][key] = {self.masters.key: rest}

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load state in the dtypes it was saved in: torch would cast moments and rests to bf16."""
        saved = state_dict["state"]
        self._check_way(saved)
        own = {k: {n: v for n, v in s.items() if n not in REST_KEYS} for k, s in saved.items()}
        self._inner_load({**state_dict, "state": {k: s for k, s in own.items() if s}})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(keys, self._parameters()):
            held = self.optimizer.state.get(p, {})
            for name, value in own.get(key, {}).items():
                now = held.get(name)
                if isinstance(now, Tensor) and isinstance(value, Tensor) and now.dtype != value.dtype:
                    held[name] = value.detach().to(now.device, copy=True)
            rest = saved.get(key, {}).get(self.masters.key) if self.masters.key else None
            if rest is None:
                continue
            take_correction(p)
            rest = rest.detach().to(p.device, copy=True)
            if held:
                held[self.masters.key] = rest
            else:
                attach_correction(p, rest)

    def _check_way(self, saved: dict[Any, Any]) -> None:
        mine = {(self.masters.key, self.masters.dtype)} if self.masters.key else set()
        found = {(name, entry[name].dtype) for entry in saved.values() for name in REST_KEYS if name in entry}
        if found - mine:
            shown = ", ".join(f"{name} ({dtype})" for name, dtype in sorted(found - mine, key=str))
            needs = f"{self.masters.key} ({self.masters.dtype})" if self.masters.key else "none"
            raise CheckpointMismatchError(
                f"BF16Precision: the checkpoint's weights were kept with {shown}, and this run keeps {needs}. Resume "
                "with the weights= and correction= it was written with, or start from its weights alone "
                "(load_from_checkpoint, then fit without ckpt_path)."
            )


class _Counters:
    """Numbers that a step advances once (``group["step"]``): every call of the user's step starts from the same."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self.own = {k: v for k, v in optimizer.__dict__.items() if type(v) in (int, float)}

    def rewind(self) -> None:
        """Put the numbers back to what they were before the step."""
        for group, before in zip(self.optimizer.param_groups, self.groups):
            params = group["params"]
            group.clear()
            group.update({"params": params, **before})
        held = self.optimizer.__dict__
        for name in [k for k, v in held.items() if type(v) in (int, float) and k not in self.own]:
            del held[name]
        held.update(self.own)


def _bucket_size(p: Tensor) -> int:
    return _BUCKET_ON_CPU if p.device.type == "cpu" else _BUCKET_ON_ACCELERATOR


def _stand_in(values: Tensor, gradient: Tensor | None) -> Tensor:
    stand_in = values.requires_grad_(True)
    assert gradient is not None
    stand_in.grad = gradient.detach().to(torch.float32)
    return stand_in


def _part(value: Any, p: Tensor, part: slice) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.view(-1)[part] if value.shape == p.shape else value.clone()


def _gather(state: dict[str, Any], got: dict[str, Any], p: Tensor, part: slice) -> None:
    """Put the state of a slice into the state of its parameter; in the first step it is made there."""
    size = part.stop - part.start
    for key, value in got.items():
        if isinstance(value, Tensor) and value.shape == (size,) and value.ndim:
            if key not in state or not isinstance(state[key], Tensor) or state[key].shape != p.shape:
                state[key] = torch.empty(p.shape, dtype=value.dtype, device=value.device)
            target = state[key].view(-1)[part]
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)
        else:
            state[key] = value
