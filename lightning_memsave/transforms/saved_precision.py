"""Keep what blocks save for backward in 8 bits, and masks in one bit."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._patch import InstanceForward, patch_forward
from lightning_memsave.transforms._saved_weights import SavedWeights
from lightning_memsave.transforms.blocks import select_blocks

__all__ = ["DTYPES", "SavedCounts", "compress_blocks", "pack_bits", "saved_counts", "unpack_bits"]

SUBJECT = "SavedActivationPrecision"
DTYPES = ("int8", "fp8")
Narrow = Literal["int8", "fp8"]
GROUP = 256  # values that share one fp32 scale
_TOP = {"int8": 126.0, "fp8": 448.0}  # the largest code of a value
# Codes no value has, as bytes: -128 and -127 of int8, the two NaN of e4m3.
_MINUS_INF = {"int8": 0x80, "fp8": 0xFF}
_LOWEST = {"int8": 0x81, "fp8": 0x7F}
_HALF = (torch.bfloat16, torch.float16)


@dataclass
class SavedCounts:
    """What the blocks saved.

    Args:
        tensors: How many tensors were narrowed.
        bytes_before: Their bytes.
        bytes_after: The bytes that are kept instead.

    """

    tensors: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def compress_blocks(root: nn.Module, patterns: Sequence[str], *, dtype: Narrow, min_values: int = 4096) -> Applied:
    """Narrow what the selected blocks save for backward, in place.

    Args:
        root: The model.
        patterns: ``("auto",)`` for the repeated blocks, or globs and class names.
        dtype: ``"int8"`` or ``"fp8"``, with one fp32 scale for 256 values.
        min_values: Smaller tensors are kept as they are.

    Raises:
        NothingToTransformError: If nothing is selected.

    """
    blocks = select_blocks(root, patterns, subject=SUBJECT)
    undo = [patch_forward(b.module, _compressed_forward, narrower=_Narrower(dtype, min_values)) for b in blocks]
    undo += [
        patch_forward(module, _one_bit_forward, min_values=min_values)
        for block in blocks
        for module in block.module.modules()
        if type(module) in _ONE_BIT
    ]
    classes = Counter(type(block.module).__name__ for block in blocks)
    what = ", ".join(f"{count} {name}" for name, count in classes.items())

    def undo_all() -> None:
        while undo:
            undo.pop()()

    return Applied(summary=f"keep what {what} save for backward in {dtype}", num_modules=len(blocks), undo=undo_all)


def saved_counts(root: nn.Module) -> SavedCounts:
    """Return the sum of what the blocks below ``root`` narrowed so far."""
    total = SavedCounts()
    for module in root.modules():
        patch = module.__dict__.get("forward")
        while isinstance(patch, InstanceForward):
            if patch.call is _compressed_forward:
                counts = patch.options["narrower"].counts
                total.tensors += counts.tensors
                total.bytes_before += counts.bytes_before
                total.bytes_after += counts.bytes_after
            patch = patch.inner
    return total


def _compressed_forward(patch: InstanceForward, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return patch.inner(*args, **kwargs)
    with patch.options["narrower"].block(patch.module):
        return patch.inner(*args, **kwargs)


class _Narrower:
    """Packs what one block saves."""

    def __init__(self, dtype: Narrow, min_values: int) -> None:
        self.dtype, self.min_values = dtype, min_values
        self.counts = SavedCounts()
        self._kept: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Kept]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Narrower:
        return _Narrower(self.dtype, self.min_values)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Narrower, (self.dtype, self.min_values)

    @contextmanager
    def block(self, module: nn.Module) -> Iterator[None]:
        """Narrow what is saved inside, except the block's own weights and buffers."""
        weights = SavedWeights(module)
        self._kept.clear()
        with saved_tensors_hooks(lambda tensor: self._pack(tensor, weights), _unpack):
            yield

    def _pack(self, tensor: Tensor, weights: SavedWeights) -> Any:
        if tensor.numel() < self.min_values or not _narrows(tensor) or weights.hold(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version, tensor.storage_offset(), tensor.numel())
        _, found = self._kept.get(key, (None, None))
        kept = found() if found is not None else None
        if kept is None:
            flat = tensor.detach().as_strided((tensor.numel(),), (1,))
            kept = _Bits(flat) if tensor.dtype == torch.bool else _EightBits(flat, self.dtype)
            self._kept[key] = (StorageWeakRef(storage), weakref.ref(kept))  # type: ignore[no-untyped-call]
            self.counts.tensors += 1
            self.counts.bytes_before += tensor.numel() * tensor.element_size()
            self.counts.bytes_after += kept.nbytes
        return _View(kept, tensor.shape, tensor.stride())


def _narrows(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta:
        return False
    if not tensor.numel() or not _dense(tensor):
        return False
    if tensor.dtype == torch.bool:
        return True
    return (
        tensor.dtype in (torch.float32, *_HALF) and tensor.ndim > 1 and tensor.shape[-1] > 1
    )  # (..., 1) holds statistics: mean, rstd


def _dense(tensor: Tensor) -> bool:
    """Return whether the values are one piece of memory: an expanded or sliced tensor would grow by being packed."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


# -- forms -------------------------------------------------------------------------------------------------------------
class _Kept:
    """A flat tensor in fewer bits."""

    nbytes = 0

    def flat(self) -> Tensor:
        """Return it in its own dtype."""
        raise TypeError


class _EightBits(_Kept):
    """Eight bits a value and one fp32 scale for 256 of them."""

    def __init__(self, flat: Tensor, dtype: Narrow) -> None:
        self._dtype, self._narrow = flat.dtype, dtype
        self._codes, self._scales = _quantize(flat, dtype)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def flat(self) -> Tensor:
        """Return the values, rounded."""
        return _dequantize(self._codes, self._scales, self._dtype, self._narrow)


class _Bits(_Kept):
    """One bit a value."""

    def __init__(self, flat: Tensor) -> None:
        self._count = flat.numel()
        self._bits = pack_bits(flat)
        self.nbytes = self._bits.nbytes

    def flat(self) -> Tensor:
        """Return the mask."""
        return unpack_bits(self._bits, self._count)


@dataclass
class _View:
    """What autograd keeps instead of a tensor: several views of one memory share its bits."""

    kept: _Kept
    shape: torch.Size
    stride: tuple[int, ...]


def _unpack(saved: Any) -> Tensor:
    return saved.kept.flat().as_strided(saved.shape, saved.stride) if isinstance(saved, _View) else saved


def _quantize(flat: Tensor, dtype: Narrow) -> tuple[Tensor, Tensor]:
    """Return codes and scales; what an additive mask hides (-inf, or the dtype's lowest value) has codes of its own."""
    count = flat.numel()
    groups = -(-count // GROUP)
    values = torch.zeros(groups * GROUP, dtype=torch.float32, device=flat.device)
    values[:count] = flat
    lowest = torch.finfo(flat.dtype).min
    no_value, hidden = values == -torch.inf, values < lowest / 2
    values = values.masked_fill_(hidden, 0.0).view(groups, GROUP)
    scales = values.abs().amax(dim=1) / _TOP[dtype]
    values.div_(torch.where(scales > 0, scales, 1.0)[:, None])
    codes = (values.round_().to(torch.int8) if dtype == "int8" else values.to(torch.float8_e4m3fn)).view(-1)
    for mask, code in ((hidden, _LOWEST[dtype]), (no_value, _MINUS_INF[dtype])):
        codes.view(torch.uint8).masked_fill_(mask, code)
    return codes[:count].clone(), scales


def _dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, like: Narrow) -> Tensor:
    count = codes.numel()
    values = torch.zeros(scales.numel() * GROUP, dtype=torch.float32, device=codes.device)
    values[:count] = codes.to(torch.float32)
    values.view(-1, GROUP).mul_(scales[:, None])
    for code, hidden in ((_LOWEST[like], torch.finfo(dtype).min), (_MINUS_INF[like], -torch.inf)):
        values[:count].masked_fill_(codes.view(torch.uint8) == code, hidden)
    values.view(-1, GROUP).add_((scales * 0)[:, None])  # NaN where a value of the group was
    return values[:count].to(dtype)


def pack_bits(mask: Tensor) -> Tensor:
    """Return a flat bool tensor as bytes of eight values.

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])

    """
    count = mask.numel()
    rows = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8, device=mask.device)
    rows[:count] = mask
    rows = rows.view(-1, 8)
    packed = rows[:, 0].clone()
    for bit in range(1, 8):
        packed |= rows[:, bit] << bit
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the flat bool tensor of ``count`` values that ``pack_bits`` was given."""
    out = torch.empty(packed.numel(), 8, dtype=torch.bool, device=packed.device)
    for bit in range(8):
        out[:, bit] = (packed >> bit) & 1
    return out.view(-1)[:count]


# -- layers whose backward needs one bit a value -----------------------------------------------------------------------
class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clamp_min(0)
        ctx.shape = x.shape
        ctx.save_for_backward(pack_bits((out > 0).reshape(-1)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        return grad * unpack_bits(packed, grad.numel()).view(ctx.shape)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        # the same draw as torch's own kernel makes for this device
        mask = torch.nn.functional.dropout(torch.ones_like(x, memory_format=torch.contiguous_format), p) != 0
        ctx.shape, ctx.scale = x.shape, 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
        ctx.save_for_backward(pack_bits(mask.reshape(-1)))
        return x * mask * ctx.scale  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (packed,) = ctx.saved_tensors
        return grad * unpack_bits(packed, grad.numel()).view(ctx.shape) * ctx.scale, None


def _one_bit_forward(patch: InstanceForward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    module = patch.module
    plain = args or kwargs or getattr(module, "inplace", False) or not torch.is_grad_enabled()
    if plain or torch.compiler.is_compiling() or x.numel() < patch.options["min_values"] or not x.requires_grad:
        return patch.inner(x, *args, **kwargs)
    return _ONE_BIT[type(module)](module, x)


def _relu(module: Any, x: Tensor) -> Tensor:
    out: Tensor = _Relu.apply(x)  # type: ignore[no-untyped-call]
    return out


def _dropout(module: Any, x: Tensor) -> Tensor:
    if not module.training or module.p <= 0:
        return x
    out: Tensor = _Dropped.apply(x, module.p)  # type: ignore[no-untyped-call]
    return out


_ONE_BIT: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {nn.ReLU: _relu, nn.Dropout: _dropout}
