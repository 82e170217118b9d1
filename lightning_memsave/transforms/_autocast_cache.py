"""Whether autocast keeps the 16-bit copies it makes of fp32 weights until the forward is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["AutocastCache", "CachePolicy", "recomputes_activations"]

CachePolicy = Literal["auto", "off", "on"]


class AutocastCache:
    """Decide for every forward of a run whether autocast caches its casts.

    Without the cache each use of a weight makes a copy of its own that is saved for backward: a module called ``k``
    times holds ``k`` copies instead of one. With it a copy of every trainable weight lives until the forward ends,
    which is what recomputing activations is meant to avoid.

    Args:
        policy: ``"auto"`` watches the first training step: on if a module with weights was called more than once,
            off if not, or if activations are recomputed.
        module: The module that trains.
        announce: Told in one line what was decided.

    """

    def __init__(self, policy: CachePolicy, module: nn.Module, announce: Callable[[str], object]) -> None:
        self._announce = announce
        self.enabled: bool | None = {"on": True, "off": False}.get(policy)
        if self.enabled is None and recomputes_activations(module):
            self.enabled = False
        self._calls: Counter[int] = Counter()
        self._hooks: list[Any] = []
        if self.enabled is None:
            owners = [m for m in module.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
            self._hooks = [owner.register_forward_pre_hook(self._count) for owner in owners]
        self._guards = _caches_wrong_casts()
        if self.enabled is not None:
            self._say()

    def _say(self) -> None:
        kept = "kept until the forward ends" if self.enabled else "not kept: each use of a weight makes its own"
        self._announce(f"autocast's copies of the weights are {kept}")

    def _count(self, module: nn.Module, args: object) -> None:
        if torch.is_grad_enabled():
            self._calls[id(module)] += 1

    @contextmanager
    def around(self, autocast: torch.autocast) -> Iterator[None]:
        """Enter a copy of ``autocast`` with the cache as decided."""
        with torch.autocast(autocast.device, dtype=autocast.fast_dtype, cache_enabled=bool(self.enabled)):
            if self.enabled and self._guards:
                with _ClearOnGradMode():
                    yield
            else:
                yield
        if self.enabled is None and self._calls:
            self.enabled = max(self._calls.values()) > 1
            self.close()
            self._say()

    def close(self) -> None:
        """Stop watching; a second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()


def recomputes_activations(module: nn.Module) -> bool:
    """Return whether a submodule says that it recomputes its activations, in the way transformers' do."""
    return any(getattr(m, "gradient_checkpointing", False) is True for m in module.modules())


class _ClearOnGradMode(TorchFunctionMode):
    """Forget the casts when gradients are switched on or off: a cast made under ``no_grad`` passes none on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            torch.clear_autocast_cache()
        return func(*args, **(kwargs or {}))


def _caches_wrong_casts() -> bool:
    """Return whether this torch serves a cast made under ``no_grad`` to a forward that needs a gradient."""
    layer = nn.Linear(1, 1, bias=False, device="cpu", dtype=torch.float32)
    x = torch.ones(1, 1, device="cpu", dtype=torch.float32)
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True):
        with torch.no_grad():
            layer(x)
        return not layer(x).requires_grad
