"""Choose the attention kernel of a model's steps, and say which one ran and why not a better one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms._attention_kernels import FORCED, IMPLEMENTATIONS, device_problem
from lightning_memsave.transforms._attention_mode import AttentionMode, shown_layers
from lightning_memsave.transforms._attention_models import ModelsChange, find_models, set_models
from lightning_memsave.transforms._pass import Applied

__all__ = ["IMPLEMENTATIONS", "AttentionRun", "check_device", "set_attention"]

SUBJECT = "AttentionKernel"
_TRAINING = ("training_step", "backward")
_FLASH_FIRST = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def check_device(implementation: str, device_type: str) -> None:
    """Raise if an implementation has no kernel on a kind of device.

    Raises:
        ConfigurationError: With what to write instead.

    """
    problem = device_problem(implementation, device_type)
    if problem:
        raise ConfigurationError(
            f"{SUBJECT}: implementation={implementation!r} cannot run here: {problem}. Write implementation='auto'."
        )


def set_attention(
    root: nn.Module, implementation: str, *, device_type: str, half: bool
) -> tuple[Applied, ModelsChange]:
    """Set the attention of the Hugging Face models below ``root``, in place.

    Args:
        root: The model.
        implementation: One of ``IMPLEMENTATIONS``.
        device_type: Where it will run.
        half: Whether attention computes in 16 bits there.

    Returns:
        What was done with the way back, and the details.

    Raises:
        ConfigurationError: If a named kernel cannot be set; nothing was changed then.

    """
    if implementation == "flex" and not find_models(root):
        raise ConfigurationError(
            f"{SUBJECT}: implementation='flex' runs in Hugging Face models, and there is none. Write "
            "implementation='auto', or call torch.nn.attention.flex_attention in your module."
        )
    change = set_models(root, implementation, device_type=device_type, half=half)
    summary = "; ".join(change.lines) or f"{implementation}: scaled_dot_product_attention during the steps"
    return Applied(summary=summary, num_modules=max(1, change.changed), undo=change.undo), change


class AttentionRun:
    """The attention of one run: a context for its steps and backwards, and what was seen in them.

    Args:
        root: The model.
        implementation: One of ``IMPLEMENTATIONS``.
        change: What was set on its Hugging Face models.

    """

    def __init__(self, root: nn.Module, implementation: str, change: ModelsChange) -> None:
        self._root = root
        self.implementation = implementation
        self.mode = AttentionMode(implementation, {})
        self.outside = change.outside
        self._note = f" ({'; '.join(change.lines)})" if change.lines else ""
        self._active = False
        self._said: set[tuple[str, str, str]] = set()
        # torch's own inference path of these is not taken while a mode looks at the calls
        self._fast_path = any(
            isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for m in root.modules()
        )
        self._restore = _newest_flash() if implementation == "flash_attention" else None

    @contextmanager
    def context(self, phase: str) -> Iterator[None]:
        """Return the context of one phase: ``training_step``, ``backward``, ``validation_step`` ..."""
        if self._active:  # a manual backward inside of a step
            yield
            return
        if phase == "training_step":
            self.mode.masks.clear()
        if self.mode.recording:
            self.mode.names = {id(module): name for name, module in self._root.named_modules()}
        self._active = True
        try:
            with ExitStack() as stack:
                if self.implementation in FORCED:
                    stack.enter_context(sdpa_kernel([FORCED[self.implementation]]))
                elif self.implementation == "flash_attention":
                    stack.enter_context(sdpa_kernel(_FLASH_FIRST, set_priority=True))
                if phase in _TRAINING or not self._fast_path:
                    stack.enter_context(self.mode)
                yield
        finally:
            self._active = False

    def new_lines(self) -> list[str]:
        """Return what was seen and not said yet, one line for each kernel and reason; the first step is seen in full.

        Raises:
            NothingToTransformError: If the first step showed no attention.

        """
        mode, first = self.mode, self.mode.recording
        mode.recording = False
        new = [key for key in mode.kernels if key not in self._said]
        self._said.update(new)
        lines = [
            f"{kernel}: {shown_layers(mode.kernels[kernel, shown, reason])}, {shown}"
            + (f" (not {_wanted(self.implementation)}: {reason})" if reason else "")
            for kernel, shown, reason in new
        ]
        if not first:
            return lines
        if mode.with_weights:
            lines.append(
                f"math: {shown_layers(mode.with_weights)} returns attention weights, so tokens * tokens scores are "
                "kept: call it with need_weights=False"
            )
        lines += [f"{count} {what}" for what, count in mode.rewrites.items()]
        if mode.left:
            lines.append(f"{mode.left} calls with tensor subclasses or inside of torch.func left as they are")
        if _is_compiled(self._root):
            lines.append("calls in modules compiled by torch.compile are left as they are")
        if not lines and not self.outside:
            raise NothingToTransformError(
                f"{SUBJECT}: the first step called no scaled_dot_product_attention and no nn.MultiheadAttention, and "
                f"no Hugging Face model has kernels of its own{self._note}. Attention written as softmax(q @ k) @ v "
                f"cannot be changed: call torch.nn.functional.scaled_dot_product_attention, or drop {SUBJECT}."
            )
        return lines

    def close(self) -> None:
        """Take back what is global; a second call does nothing."""
        if self._restore is not None:
            self._restore()
            self._restore = None


def _is_compiled(root: nn.Module) -> bool:
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in root.modules()
    )


def _wanted(implementation: str) -> str:
    return implementation.removeprefix("sdpa_") if implementation in FORCED else "flash"


def _newest_flash() -> Callable[[], None] | None:
    """Let torch's flash kernel be that of flash-attn 4 or 3 where one is installed and torch can use it."""
    import torch
    import torch.nn.attention as attention

    activate: Any = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None or not torch.cuda.is_available() or attention.current_flash_attention_impl() is not None:
        return None
    for name in ("FA4", "FA3"):
        try:
            activate(name)
        except (ImportError, RuntimeError, ValueError, AttributeError):
            continue
        return lambda: attention.restore_flash_attention_impl(_raise_warn=False)
    return None
