"""Look at every attention call of a step, and take away what keeps a fused kernel from running it."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory.audit import listed
from lightning_memsave.transforms._attention_heads import RepeatedHeads
from lightning_memsave.transforms._attention_kernels import FORCED, SDPACall, autocast_is_on, kernel_of, why_not
from lightning_memsave.transforms._attention_masks import MaskReader

__all__ = ["AttentionMode", "Layer", "shown_layers"]

Layer = tuple[str, str]  # class, qualified name

# B = batch, H = heads, L = queries, S = keys, D = head dim
_SUBJECT = "AttentionKernel"
_MOST_SIGNATURES = 4096
_GOOD = {
    SDPBackend.MATH: ("math",),
    SDPBackend.FLASH_ATTENTION: ("flash", "cuDNN"),
    SDPBackend.EFFICIENT_ATTENTION: ("memory-efficient",),
    SDPBackend.CUDNN_ATTENTION: ("cuDNN",),
}
_CODE_OPTIMIZED = 1  # co_flags of functions; the locals of other frames are global variables
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


class AttentionMode(TorchFunctionMode):
    """Rewrite attention calls to equal ones that more kernels take, and note which kernel runs them.

    In regions compiled by ``torch.compile`` it does nothing.

    Args:
        implementation: What was asked for.
        names: Qualified names of the modules, by ``id``.

    Attributes:
        kernels: ``(kernel, the call in words, why not flash) -> layers``, each layer with its number of calls.
        rewrites: What was taken away, and how often.
        with_weights: Layers that return attention weights, which no fused kernel has.
        left: Calls with tensor subclasses or inside of ``torch.func``, which are left as they are.

    """

    def __init__(self, implementation: str, names: Mapping[int, str]) -> None:
        super().__init__()
        self.implementation = implementation
        self.names = names
        self.recording = True
        self.kernels: dict[tuple[str, str, str], Counter[Layer]] = {}
        self.rewrites: Counter[str] = Counter()
        self.with_weights: Counter[Layer] = Counter()
        self.left = 0
        self.masks = MaskReader()
        self._heads = RepeatedHeads()
        self._chosen: dict[tuple[Any, ...], tuple[str, str, str]] = {}
        self._handlers: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head,
            Tensor.backward: self._backward,
            torch.autograd.backward: self._backward,
            torch.autograd.grad: self._backward,
        }
        if implementation != "math":
            self._handlers.update(self._heads.watched)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand attention calls to their handler, and call everything else as it is."""
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        handler = self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        if handler != self._backward and not _ordinary(args):
            return self._leave(func, args, kwargs or {})
        return handler(func, args, kwargs or {})

    # -- scaled_dot_product_attention ---------------------------------------------------------------------------------
    def _attention(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = SDPACall.bind(args, kwargs)
        if not _shapes_known(call):
            return self._leave(func, args, kwargs)
        added = False
        if self.implementation != "math":
            self._same_dtype(call)
            self._drop_mask(call)
            self._share_heads(call)
            added = self._four_dimensions(call)
        self._check(call.signature(), lambda: call)
        out = func(**call.arguments())
        return out.squeeze(1) if added else out

    def _same_dtype(self, call: SDPACall) -> None:
        """Cast q, k and v that differ to the narrowest of their dtypes: torch refuses them outside of autocast."""
        tensors = (call.query, call.key, call.value)
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) == 1 or autocast_is_on(call.query.device.type):
            return
        dtype = min((t.dtype for t in tensors), key=lambda d: (d.itemsize, d != call.value.dtype))
        call.query, call.key, call.value = (t.to(dtype) for t in tensors)
        if call.mask is not None and call.mask.dtype != torch.bool:
            call.mask = call.mask.clamp(min=torch.finfo(dtype).min).to(dtype)  # -inf of a whole row would be NaN
        self.rewrites[f"q, k and v of different dtypes cast to {str(dtype).removeprefix('torch.')}"] += 1

    def _drop_mask(self, call: SDPACall) -> None:
        if call.mask is None or call.causal:
            return
        kind = self.masks.read(call.mask, call.query.shape[-2], call.key.shape[-2])
        if kind == "none":
            call.mask = None
            self.rewrites["masks that hide nothing dropped"] += 1
        elif kind == "causal":
            call.mask, call.causal = None, True
            self.rewrites["causal masks replaced by is_causal=True"] += 1

    def _share_heads(self, call: SDPACall) -> None:
        """Give the kernel the heads that repeated keys and values were made from, where it takes them."""
        if call.gqa or call.query.ndim != 4:
            return
        key, value = self._heads.source(call.key), self._heads.source(call.value)
        if call.key.shape[1] == call.value.shape[1] == 1 < call.query.shape[1]:  # broadcast
            key, value = call.key, call.value
        if key is None or value is None or key.shape[1] != value.shape[1] or call.query.shape[1] % key.shape[1]:
            return
        grouped = SDPACall(call.query, key, value, call.mask, call.dropout, call.causal, call.scale, gqa=True)
        fused = self._kernel(grouped)[0] not in ("", "math")
        if fused or self._kernel(call)[0] in ("", "math"):
            call.key, call.value, call.gqa = key, value, True
            self.rewrites["repeated key and value heads shared (enable_gqa=True)"] += 1

    def _four_dimensions(self, call: SDPACall) -> bool:
        """Give calls without heads one head: fused kernels take four dimensions."""
        tensors = (call.query, call.key, call.value)
        fits = call.mask is None or call.mask.ndim in (2, 3)
        if not fits or any(t.ndim != 3 for t in tensors) or len({t.shape[0] for t in tensors}) > 1:
            return False
        call.query, call.key, call.value = (t.unsqueeze(1) for t in tensors)
        if call.mask is not None and call.mask.ndim == 3:
            call.mask = call.mask.unsqueeze(1)
        self.rewrites["calls without a dimension of heads given one"] += 1
        return True

    def _backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a backward under this mode, so that a recompute in it makes the calls the forward made.

        torch takes a mode off while it handles a call, and the body of these functions would hand itself to the mode
        again; so the body runs without that look.
        """
        given = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else (a,))]
        if any(_has_own_functions(t) for t in given):
            return func(*args, **kwargs)
        with self:
            return _body(func)(*args, **kwargs)

    def _leave(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.left += func in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
        return func(*args, **kwargs)

    # -- nn.MultiheadAttention ----------------------------------------------------------------------------------------
    def _multi_head(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = _MULTI_HEAD.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if self.implementation != "math":
            self._drop_multi_head_masks(given)
        if given["need_weights"]:
            if self.implementation not in ("auto", "flash_attention", "math"):
                self._refuse("it returns attention weights, which no fused kernel has: pass need_weights=False")
            self.with_weights[self._layer()] += 1
        else:
            self._check(_signature_inside(given), lambda: _inside(given))
        return func(*bound.args, **bound.kwargs)

    def _drop_multi_head_masks(self, given: dict[str, Any]) -> None:
        query, key = given["query"], given["key"]
        queries, keys = query.shape[0], key.shape[0]
        padding, mask = given["key_padding_mask"], given["attn_mask"]
        kind = "dense" if mask is None else _kind(self.masks, mask, queries, keys)
        # a hint that is wrong is ignored only where there is a padding mask
        trusted = kind == "causal" or not given["is_causal"]
        if padding is not None and trusted and _kind(self.masks, padding[..., None, :], queries, keys) == "none":
            given["key_padding_mask"] = None
            self.rewrites["padding masks that hide nothing dropped"] += 1
        if kind == "none" and not given["is_causal"]:
            given["attn_mask"] = None
            self.rewrites["masks that hide nothing dropped"] += 1
        same_keys = given["key_padding_mask"] is None and given["bias_k"] is None and not given["add_zero_attn"]
        if kind == "causal" and same_keys and not (given["need_weights"] or given["is_causal"]):
            given["is_causal"] = True  # torch then leaves the mask out
            self.rewrites["causal masks replaced by is_causal=True"] += 1

    # -- which kernel -------------------------------------------------------------------------------------------------
    def _kernel(self, call: SDPACall) -> tuple[str, str, str]:
        """Return the kernel of a call, the call in words, and why it is not the one asked for, or flash."""
        return self._ask(call.signature(), lambda: call)[0]

    def _ask(self, signature: tuple[Any, ...], make: Callable[[], SDPACall]) -> tuple[tuple[str, str, str], bool]:
        known = self._chosen.get(signature)
        if known is not None:
            return known, False
        if len(self._chosen) >= _MOST_SIGNATURES:
            self._chosen.clear()
        call = make()
        kernel, reason = kernel_of(call), ""
        wanted = FORCED.get(self.implementation, SDPBackend.FLASH_ATTENTION)
        if kernel not in _GOOD[wanted]:
            reason = why_not(call, wanted) or "torch's settings prefer another kernel"
        known = self._chosen[signature] = kernel, call.shown(), reason
        return known, True

    def _check(self, signature: tuple[Any, ...], make: Callable[[], SDPACall]) -> None:
        (kernel, shown, reason), new = self._ask(signature, make)
        if self.implementation == "flex":
            self._refuse("it calls scaled_dot_product_attention itself, and flex runs in Hugging Face models")
        if not kernel and self.implementation in FORCED:
            del self._chosen[signature]
            self._refuse(reason)
        if new or self.recording:
            self.kernels.setdefault((kernel or "unknown", shown, reason), Counter())[self._layer()] += 1

    def _refuse(self, reason: str) -> None:
        raise ConfigurationError(
            f"{_SUBJECT}: implementation={self.implementation!r} cannot run {shown_layers([self._layer()])}: {reason}. "
            "Write implementation='auto', which takes the best kernel that can run each layer."
        )

    def _layer(self) -> tuple[str, str]:
        """Return the class and the name of the calling module: looked up in the frames, on first calls only."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            first = code.co_varnames[0] if code.co_argcount and code.co_flags & _CODE_OPTIMIZED else ""
            if first in ("self", "module"):
                local = frame.f_locals
                module = local.get(first)
                if type(local) is dict:
                    local.clear()  # a snapshot that lives as long as the frame, and would keep its tensors
                if isinstance(module, nn.Module):
                    return type(module).__name__, self.names.get(id(module), "")
            frame = frame.f_back
        return "a function", ""


def shown_layers(layers: Iterable[Layer]) -> str:
    """Return layers as text, e.g. ``2 LlamaAttention (layers.0.self_attn, layers.1.self_attn)``."""
    by_class: dict[str, list[str]] = {}
    for name, qualified in layers:
        by_class.setdefault(name, []).append(qualified)
    parts = []
    for name, found in by_class.items():
        named = [qualified for qualified in found if qualified]
        count = f"{len(found)} " if len(found) > 1 else ""
        parts.append(f"{count}{name}" + (f" ({listed(named)})" if named else ""))
    return ", ".join(parts)


@cache
def _body(function: Any) -> Callable[..., Any]:
    """Return a copy of a Python function of torch that does not look for modes."""
    never = {name: _never for name in function.__globals__ if name.startswith("has_torch_function")}
    body = FunctionType(function.__code__, {**function.__globals__, **never}, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _has_own_functions(value: Any) -> bool:
    """Whether a value is a tensor of a subclass that handles torch functions itself."""
    if not isinstance(value, Tensor) or type(value) is Tensor:
        return False
    return type(value).__torch_function__ is not torch._C._disabled_torch_function_impl


def _never(*ignored: Any) -> bool:
    return False


def _ordinary(args: tuple[Any, ...]) -> bool:
    """Whether these are tensors whose values can be looked at: no subclass, and not inside ``torch.func``."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(a) in (Tensor, nn.Parameter) for a in args if isinstance(a, Tensor))


def _shapes_known(call: SDPACall) -> bool:
    tensors = (call.query, call.key, call.value, *(() if call.mask is None else (call.mask,)))
    return all(
        type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_nested for t in tensors
    ) and all(t.ndim >= 2 and t.is_floating_point() and t.device.type != "meta" for t in tensors[:3])


def _kind(masks: MaskReader, mask: Tensor, queries: int, keys: int) -> str:
    return masks.read(mask, queries, keys, true_hides=True)


def _signature_inside(given: Mapping[str, Any]) -> tuple[Any, ...]:
    query, mask = given["query"], given["attn_mask"]
    return (
        query.shape,
        given["key"].shape,
        given["num_heads"],
        query.dtype,
        query.device,
        autocast_is_on(query.device.type),
        None if mask is None else mask.dtype,
        given["key_padding_mask"] is None,
        given["is_causal"],
        given["training"] and given["dropout_p"] > 0,
        given["bias_k"] is None,
        given["add_zero_attn"],
        torch.is_grad_enabled(),
    )


def _inside(given: Mapping[str, Any]) -> SDPACall:
    """Return a call like that of ``scaled_dot_product_attention`` inside of ``F.multi_head_attention_forward``."""
    query, heads, padding = given["query"], given["num_heads"], given["key_padding_mask"]
    num_queries = query.shape[0]
    num_keys = given["key"].shape[0] + (given["bias_k"] is not None) + bool(given["add_zero_attn"])

    def stand_in(tokens: int) -> Tensor:
        made = torch.empty((1, heads, tokens, query.shape[-1] // heads), dtype=query.dtype, device=query.device)
        return made.requires_grad_(torch.is_grad_enabled())

    mask = None
    if padding is not None or (given["attn_mask"] is not None and not given["is_causal"]):
        mask = torch.empty((1, 1, num_queries, num_keys), dtype=query.dtype, device=query.device)
    causal = bool(given["is_causal"]) and mask is None
    dropout = given["dropout_p"] if given["training"] else 0.0
    return SDPACall(stand_in(num_queries), stand_in(num_keys), stand_in(num_keys), mask, dropout, causal)
