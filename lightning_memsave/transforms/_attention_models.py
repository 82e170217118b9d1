"""Set the attention of Hugging Face models, in every part of a composite model, with the way back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._attention_kernels import FORCED

__all__ = ["ModelsChange", "find_models", "set_models"]

_SUBJECT = "AttentionKernel"

_NO_SOFTCAP = "sdpa has no soft-capped scores"


@dataclass
class ModelsChange:
    """What was set.

    Args:
        lines: What changed and what was left, for people.
        changed: How many parts were changed.
        found: How many parts with an attention of their own there are.
        outside: Whether a part now runs kernels outside of ``scaled_dot_product_attention``.

    """

    lines: list[str] = field(default_factory=list)
    changed: int = 0
    found: int = 0
    outside: bool = False
    _before: list[tuple[Any, str | None]] = field(default_factory=list)

    def undo(self) -> None:
        """Put the implementations back; a second call does nothing."""
        while self._before:
            config, old = self._before.pop()
            config._attn_implementation_internal = old


def find_models(root: nn.Module) -> list[tuple[str, Any]]:
    """Return the parts of Hugging Face models below ``root`` that have a config of their own, outermost first."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return []
    found: dict[int, tuple[str, Any]] = {}
    for name, module in root.named_modules():
        if isinstance(module, library.PreTrainedModel):
            found.setdefault(id(module.config), (name or type(module).__name__, module))
    return list(found.values())


def set_models(root: nn.Module, implementation: str, *, device_type: str, half: bool) -> ModelsChange:
    """Set the attention implementation of every Hugging Face model below ``root``, in place.

    Args:
        root: The model.
        implementation: One of ``IMPLEMENTATIONS``.
        device_type: Where it will run.
        half: Whether attention computes in 16 bits there.

    Raises:
        ConfigurationError: If a named kernel cannot be set on a part; nothing is changed then.

    """
    parts = find_models(root)
    change = ModelsChange(found=len(parts))
    change._before = [(c, c._attn_implementation_internal) for c in _configs(parts)]
    try:
        if parts:
            _set(parts, implementation, change, device_type, half)
    except BaseException:
        change.undo()
        raise
    return change


def _set(parts: Sequence[tuple[str, Any]], implementation: str, change: ModelsChange, device: str, half: bool) -> None:
    if implementation == "flex":
        _set_all(parts, "flex_attention", implementation, change)
        change.outside = True
    elif implementation in FORCED and implementation != "math":
        _set_all(parts, "sdpa", implementation, change)
    elif implementation == "math":
        _set_all([p for p in parts if p[1].config._attn_implementation != "eager"], "sdpa", implementation, change)
    else:
        version, problem = _flash_attn(device, half) if implementation == "flash_attention" else ("", "")
        if problem:
            change.lines.append(f"flash-attn is not used: {problem}. SDPA runs, whose own flash kernel keeps as little")
        for name, model in parts:
            _set_best(name, model, version, change)


def _set_all(parts: Sequence[tuple[str, Any]], wanted: str, implementation: str, change: ModelsChange) -> None:
    problems = [f"{name} ({type(m).__name__}): {why}" for name, m in parts if (why := _try(m, wanted, change))]
    if problems:
        raise ConfigurationError(
            f"{_SUBJECT}: implementation={implementation!r} needs attn_implementation={wanted!r}, which cannot be set "
            f"on {'; '.join(problems)}. Write implementation='auto', which leaves such models as they are."
        )
    owned = {id(model.config) for _, model in parts}
    for config in _configs(parts):  # parts of older models that are no models themselves
        if id(config) not in owned and config._attn_implementation not in (None, wanted):
            config._attn_implementation_internal = wanted
            change.changed += 1
    if change.changed:
        change.lines.append(f"{', '.join(name for name, _ in parts)} runs {wanted}")


def _set_best(name: str, model: Any, version: str, change: ModelsChange) -> None:
    current = model.config._attn_implementation
    if version and not _try(model, version, change):
        change.outside = True
        change.lines.append(f"{name} runs {version}")
    elif current == "eager":
        why = _keeps_eager(model.config) or _try(model, "sdpa", change)
        change.lines.append(
            f"{name} stays eager, which keeps tokens * tokens scores ({why})" if why else f"{name} runs sdpa, was eager"
        )
    elif current != "sdpa":
        change.outside = True
        change.lines.append(f"{name} stays on {current}, as it was made")


def _try(model: Any, wanted: str, change: ModelsChange) -> str:
    """Set one part's own implementation; return why it cannot be set, or ``""``."""
    config = model.config
    if config._attn_implementation == wanted:
        return ""
    if wanted == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        return _NO_SOFTCAP  # transformers 4 would leave it out
    old = config._attn_implementation_internal
    try:
        model.set_attn_implementation({"": wanted})
    except (ValueError, ImportError) as error:
        config._attn_implementation_internal = old
        return str(error).split("\n")[0].split(". ")[0].rstrip(".")
    if config._attn_implementation != wanted:
        return "its attention cannot be changed once it is made"
    change.changed += 1
    return ""


def _keeps_eager(config: Any) -> str:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return _NO_SOFTCAP
    if getattr(config, "output_attentions", False):
        return "output_attentions=True asks for the scores"
    return ""


def _configs(parts: Sequence[tuple[str, Any]]) -> Iterator[Any]:
    """Yield every config that setting an implementation may write to, each once."""
    seen: set[int] = set()
    queue = [model.config for _, model in parts]
    while queue:
        config = queue.pop()
        if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        seen.add(id(config))
        yield config
        queue += [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]


def _flash_attn(device_type: str, half: bool) -> tuple[str, str]:
    """Return the newest flash-attn that can run as transformers calls it, or why there is none."""
    if device_type != "cuda":
        return "", f"it runs on CUDA, and this run is on {device_type}"
    if not half:
        return "", 'it computes in 16 bits only (precision="bf16-mixed" or "bf16-true")'
    from transformers import utils

    capability = torch.cuda.get_device_capability()
    oldest = {4: (9, 0), 3: (9, 0), 2: (8, 0)}
    for version, needed in oldest.items():
        installed: Callable[[], bool] | None = getattr(utils, f"is_flash_attn_{version}_available", None)
        # version 3 has kernels for this one generation
        fits = capability[0] == 9 if version == 3 else capability >= needed
        if installed is not None and installed() and fits:
            return f"flash_attention_{version}", ""
    return "", 'it is not installed for this GPU (pip install "lightning-memsave[flash]")'
