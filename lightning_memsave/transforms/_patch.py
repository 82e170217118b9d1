"""Replace a method on one instance: no class is touched, no name changes, and copies stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["InstanceForward", "patch_forward"]


class InstanceForward:
    """A ``forward`` that belongs to one module instance.

    A closure would be shared by ``copy.deepcopy(module)``, and the copy would then run the weights of the
    original. This object is copied and pickled with its module instead.

    Args:
        module: The instance whose ``forward`` this is.
        inner: The bound ``forward`` it replaces.
        call: Module-level function ``call(patch, *args, **kwargs)``.
        options: Plain data for ``call``.

    """

    def __init__(
        self, module: nn.Module, inner: Callable[..., Any], call: Callable[..., Any], options: dict[str, Any]
    ) -> None:
        self.module = module
        self.inner = inner
        self.call = call
        self.options = options
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replacement, or what it replaced once it was undone."""
        if not self.active:
            return self.inner(*args, **kwargs)
        return self.call(self, *args, **kwargs)


def patch_forward(module: nn.Module, call: Callable[..., Any], **options: Any) -> Callable[[], None]:
    """Replace ``module.forward`` on this instance in place.

    Args:
        module: The module to patch; its class, name and children stay as they are.
        call: Module-level function ``call(patch, *args, **kwargs)``; ``patch.inner`` is the forward it replaces.
        options: Plain data, kept as ``patch.options``.

    Returns:
        A function that puts the old ``forward`` back. Where somebody replaced ``forward`` again since, their
        replacement stays and this one only stops doing anything.

    """
    previous = module.__dict__.get("forward")
    patch = InstanceForward(module, module.forward, call, options)
    module.__dict__["forward"] = patch

    def undo() -> None:
        patch.active = False
        if module.__dict__.get("forward") is not patch:
            return
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous

    return undo
