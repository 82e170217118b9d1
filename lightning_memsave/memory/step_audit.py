"""Watch optimizers through their first steps: which tensors get gradients, and what state they then hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_memsave.memory._attention_spy import AttentionSpy, eager_attention
from lightning_memsave.memory.audit import Finding, listed
from lightning_memsave.units import format_bytes

__all__ = ["StepAudit"]

# bitsandbytes keeps 32-bit state for smaller tensors
_MIN_8BIT = 4096


class _Watched:
    """What one optimizer did: how often it stepped, and which of its tensors had a gradient then."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self.missing: dict[int, Tensor] = {}
        self.seen: set[int] = set()

    def stepped(self) -> None:
        self.steps += 1
        elsewhere = getattr(self.optimizer, "_memsave_stepped", ())  # their gradients were on the host, and are freed
        for parameter in _parameters(self.optimizer):
            if parameter.grad is not None or id(parameter) in elsewhere:
                self.seen.add(id(parameter))
                self.missing.pop(id(parameter), None)
            elif parameter.requires_grad and id(parameter) not in self.seen:
                self.missing[id(parameter)] = parameter


class StepAudit:
    """Look at a module and its optimizers until each optimizer has stepped once.

    Args:
        module: The module that trains.
        optimizers: Its optimizers; those that are no torch optimizers are left out.
        autocast: Whether mixed precision casts the weights.

    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Any], *, autocast: bool) -> None:
        self._module = module
        self._autocast = autocast
        self._watched = [_Watched(o) for o in optimizers if isinstance(o, Optimizer)]
        self._trainable = {id(p) for p in module.parameters() if p.requires_grad}
        # A hook of all optimizers: it also runs where an optimizer steps on one parameter inside of a backward.
        self._handles = [register_optimizer_step_post_hook(self._stepped)]
        self._compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in module.modules())
        self._spy = AttentionSpy()
        self._reentrant = 0
        self.batches = 0

    @property
    def complete(self) -> bool:
        """Whether every optimizer has stepped."""
        return all(watched.steps for watched in self._watched)

    def _stepped(self, optimizer: Optimizer, *ignored: Any) -> None:
        for watched in self._watched:
            if watched.optimizer is optimizer:
                watched.stepped()

    def watching(self) -> AbstractContextManager[Any]:
        """Return the context of a training step; under ``torch.compile`` it looks at nothing."""
        return nullcontext() if self._compiled else self._spy

    def saw_loss(self, loss: Tensor) -> None:
        """Look at the graph of a loss before its backward."""
        self._reentrant = max(self._reentrant, _count_nodes(loss, "CheckpointFunctionBackward"))

    def findings(self) -> list[Finding]:
        """Return what was found."""
        names = {id(p): name for name, p in self._module.named_parameters()}
        found: list[Finding] = []
        for index, watched in enumerate(self._watched):
            label = type(watched.optimizer).__name__ + (f" {index}" if len(self._watched) > 1 else "")
            found += [_gradients(label, watched, names), _state(label, watched)]
        found += [finding for check in self._checks() for finding in check(names)]
        found += [*self._spy.findings(), *eager_attention(self._module)]
        return found

    def close(self) -> None:
        """Take the hooks off; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def _checks(self) -> Sequence[Callable[[dict[int, str]], Iterator[Finding]]]:
        return (self._in_no_optimizer, self._dtypes, self._frozen, self._own_checkpoints)

    def _in_no_optimizer(self, names: dict[int, str]) -> Iterator[Finding]:
        held = {id(p) for watched in self._watched for p in _parameters(watched.optimizer)}
        left = tuple(name for i, name in names.items() if i in self._trainable and i not in held)
        if left and self._watched:
            yield Finding(
                "gradients",
                "warning",
                f"{len(left)} trainable tensors are in no optimizer: {listed(left)}. They hold gradients and never "
                "change: set requires_grad=False, or give them to an optimizer.",
                left,
            )

    def _dtypes(self, names: dict[int, str]) -> Iterator[Finding]:
        every = [p for watched in self._watched for p in _parameters(watched.optimizer)]
        half = tuple(names.get(id(p), "?") for p in every if p.requires_grad and p.dtype == torch.float16)
        packed = tuple(names.get(id(p), "?") for p in every if not (p.is_floating_point() or p.is_complex()))
        if half:
            yield Finding(
                "dtypes",
                "problem",
                f"{len(half)} trainable tensors are fp16: {listed(half)}. Small updates round to zero, and gradients "
                "cannot be unscaled: keep trainable weights in fp32 or bf16.",
                half,
            )
        if packed:
            text = f"{len(packed)} quantized tensors are in an optimizer, which passes over them: {listed(packed)}."
            yield Finding("dtypes", "ok", text, packed)

    def _frozen(self, names: dict[int, str]) -> Iterator[Finding]:
        frozen = [
            p for p in self._module.parameters() if not p.requires_grad and p.dtype == torch.float32 and p.ndim > 1
        ]
        if frozen and self._autocast:
            total = sum(p.nbytes for p in frozen)
            yield Finding(
                "frozen weights",
                "warning",
                f"{format_bytes(total)} of frozen fp32 weights are cast again at every use: store them in bf16, which "
                f"frees {format_bytes(total // 2)}.",
                tuple(names[id(p)] for p in frozen),
            )

    def _own_checkpoints(self, names: dict[int, str]) -> Iterator[Finding]:
        if self._reentrant:
            yield Finding(
                "recomputation",
                "warning",
                f"the model calls reentrant torch.utils.checkpoint itself ({self._reentrant} times): weights behind "
                "frozen inputs get no gradient, and DDP may fail. Pass use_reentrant=False, or remove it and use "
                "ActivationCheckpointing.",
            )


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _gradients(label: str, watched: _Watched, names: dict[int, str]) -> Finding:
    if not watched.steps:
        return Finding("gradients", "warning", f"{label} did not step: its gradients were not looked at.")
    missing = tuple(names.get(i, "?") for i, p in watched.missing.items() if p.requires_grad)
    total = len(watched.seen) + len(missing)
    if not missing:
        return Finding("gradients", "ok", f"{label}: all {total} trainable tensors got a gradient.")
    return Finding(
        "gradients",
        "problem",
        f"{label}: {len(missing)} of {total} trainable tensors got no gradient: {listed(missing)}. They do not train: "
        "freeze them, or find what cuts them off (a detach, no_grad, reentrant checkpointing over frozen inputs).",
        missing,
    )


def _state(label: str, watched: _Watched) -> Finding:
    by_dtype: Counter[str] = Counter()
    width: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter, state in watched.optimizer.state.items():
        tensors = [t for t in state.values() if isinstance(t, Tensor)]
        for tensor in tensors:
            by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        if isinstance(parameter, Tensor):
            width[any(t.dtype == torch.uint8 for t in tensors)].append(parameter)
    shown = ", ".join(f"{format_bytes(n)} {dtype}" for dtype, n in by_dtype.most_common()) or "none"
    text = f"{label} holds state: {shown}"
    if not _asks_for_8bit(watched.optimizer) or not watched.steps:
        return Finding("optimizer state", "ok", f"{text}.")
    narrow, wide = width[True], width[False]
    small = sum(p.numel() < _MIN_8BIT for p in wide)
    text += f"; {len(narrow)} of {len(narrow) + len(wide)} tensors in 8 bits"
    if wide:
        text += f" ({small} have fewer than {_MIN_8BIT} values, {len(wide) - small} are kept in 32 bits on purpose)"
    if narrow:
        return Finding("optimizer state", "ok", f"{text}.")
    return Finding(
        "optimizer state", "problem", f"{text}. The 8-bit optimizer saves nothing here: a plain AdamW does the same."
    )


def _asks_for_8bit(optimizer: Optimizer) -> bool:
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
    return bits == 8 or "8bit" in type(optimizer).__name__.lower()


def _count_nodes(loss: Tensor, name: str) -> int:
    seen: set[Any] = set()
    queue = [loss.grad_fn]
    count = 0
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += node.name().startswith(name)
        queue += [following for following, _ in node.next_functions]
    return count
