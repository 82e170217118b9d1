"""Which attention kernels the calls of one step allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_memsave.memory.audit import Finding, listed

__all__ = ["AttentionSpy", "eager_attention"]

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class AttentionSpy(TorchFunctionMode):
    """Count the calls of ``scaled_dot_product_attention`` by what decides their kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str, str, bool]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments, then call on."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._note(dict(zip(_ARGUMENTS, args)) | kwargs)
        return func(*args, **kwargs)

    def findings(self) -> Iterator[Finding]:
        """Yield one finding for each way of calling."""
        for (dtype, mask, kernel, fused), count in self.calls.items():
            text = f"{count} calls of scaled_dot_product_attention in {dtype}, {mask}: {kernel}"
            if fused:
                yield Finding("attention", "ok", text)
            else:
                yield Finding(
                    "attention",
                    "warning",
                    f"{text}. It keeps tokens * tokens scores: drop an all-ones mask, pad on the right with "
                    "is_causal=True, or train in bf16.",
                )

    def _note(self, arguments: dict[str, Any]) -> None:
        query, key, mask = arguments["query"], arguments["key"], arguments.get("attn_mask")
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        shown = "causal" if arguments.get("is_causal") else "no mask"
        if isinstance(mask, Tensor):
            shown = f"a dense {str(mask.dtype).removeprefix('torch.')} mask {tuple(mask.shape)}"
        kernel, fused = _kernel(query, key, arguments)
        self.calls[str(dtype).removeprefix("torch."), shown, kernel, fused] += 1


def _kernel(query: Tensor, key: Tensor, arguments: dict[str, Any]) -> tuple[str, bool]:
    if query.device.type != "cuda":
        return f"on {query.device.type}, where the choice of kernel does not matter", True
    given: list[Any] = [query, key, arguments["value"], arguments.get("attn_mask")]
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        given = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
    settings = (arguments.get("dropout_p", 0.0), arguments.get("is_causal", False), arguments.get("enable_gqa", False))
    make: Any = torch.backends.cuda.SDPAParams
    params = make(*given, *settings)
    backends = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "memory-efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    possible = [name for name, can_use in backends.items() if can_use(params)]
    if possible:
        return f"{' or '.join(possible)} can run", True
    return "only the math path can run", False


def eager_attention(root: nn.Module) -> Iterator[Finding]:
    """Yield a finding if transformers models below ``root`` were made with ``attn_implementation="eager"``."""
    names = [
        name or type(module).__name__
        for name, module in root.named_modules()
        if getattr(module, "base_model_prefix", None) is not None
        and getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"
    ]
    if names:
        yield Finding(
            "attention",
            "warning",
            f'attn_implementation="eager" in {listed(names)}: tokens * tokens scores are kept in every layer. Load the '
            'model with attn_implementation="sdpa".',
            tuple(names),
        )
