"""AdamW on bf16 weights that keep an fp32 master in one more byte, with 8-bit moments."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError
from lightning_memsave.optim._adamw_rule import adamw_state, adamw_update, apply_adamw
from lightning_memsave.optim.block_moments import (
    MOMENT_BLOCK,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    moment_bytes,
)
from lightning_memsave.optim.per_parameter import PerParameterOptimizer
from lightning_memsave.optim.split_weights import (
    CORRECTIONS,
    correction_of,
    draw_correction,
    join,
    split_into,
    take_correction,
)

__all__ = ["CORRECTION_KEY", "SplitMasterAdamW", "has_narrow_moments", "split_master_state_bytes"]

CORRECTION_KEY = "correction"
MIN_NARROW_ELEMENTS = 4096  # smaller tensors keep fp32 moments
_SEED = 0x6D73

# Values stepped at a time; the temporaries of a step are about six such blocks in fp32.
_BLOCK_ON_CPU = 2**17  # the fastest of 2 ** 14 ... 2 ** 20: a block is still in the cache at its next operation
_BLOCK_ON_ACCELERATOR = 2**23


class SplitMasterAdamW(PerParameterOptimizer):
    """Train bf16 weights as AdamW trains fp32 weights, in ``5 + 8 / 256`` bytes a value with its gradient released.

    =============================== =========================== ====================================================
    bytes a value                   a large bf16 tensor         an embedding, a norm, a tensor below 4096 values
    =============================== =========================== ====================================================
    weight (the module's own)       2                           2, or 4 where it is fp32
    correction (``int16``: 2)       1                           1, or 0 where it is fp32
    first moment                    1 + 4 / 256                 4
    second moment (its root)        1 + 4 / 256                 4
    =============================== =========================== ====================================================

    Every parameter is stepped in blocks, so that nothing of its size appears in fp32. State is plain tensors.
    The fp32 values of the weights come with the parameters when ``BF16Precision("split")`` cast them; bf16 weights
    that came without start somewhere in their rounding cell, drawn with a fixed seed.

    Args:
        params: Parameters or groups. fp32 parameters (kept norms, adapters) are stepped by plain AdamW.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as in ``torch.optim.AdamW``.
        correction: ``"int8"`` (masters to 1.5e-5) or ``"int16"`` (to 1.2e-7).
        min_8bit_size: Tensors with fewer values keep fp32 moments.
        keep_32bit: ``id`` of the parameters that keep fp32 moments whatever their size.

    Raises:
        ConfigurationError: If no trainable parameter is bf16, or one is fp16.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        >>> optimizer = SplitMasterAdamW([weight], lr=1e-3)

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        correction: str = "int8",
        min_8bit_size: int = MIN_NARROW_ELEMENTS,
        keep_32bit: Collection[int] = (),
    ) -> None:
        if correction not in CORRECTIONS:
            raise ConfigurationError(f'SplitMasterAdamW: correction={correction!r}. Write "int8" or "int16".')
        self.correction_dtype = CORRECTIONS[correction]
        self.min_8bit_size = min_8bit_size
        self.num_drawn = 0
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, keep_32bit)
        _check_dtypes([p for group in self.param_groups for p in group["params"] if p.requires_grad])

    def new_state(self, p: Tensor, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return the state before the first step; takes over the correction that came with the cast."""
        if p.dtype != torch.bfloat16:
            return adamw_state(p, device)
        state: dict[str, Any] = {CORRECTION_KEY: self._first_correction(p, device)}
        if self._is_wide(p):
            return {**state, **adamw_state(p, device)}
        num_blocks = -(-p.numel() // MOMENT_BLOCK)
        for name, dtype in (("first", torch.int8), ("second", torch.uint8)):
            state[name] = torch.zeros(p.shape, dtype=dtype, device=device)
            state[f"{name}_scale"] = torch.zeros(num_blocks, dtype=torch.float32, device=device)
        return state

    def _is_wide(self, p: Tensor) -> bool:
        held = self.state.get(p)
        if held:
            return "exp_avg" in held
        return not has_narrow_moments(p, self.keeps_32bit(p), {"min_8bit_size": self.min_8bit_size})

    def _first_correction(self, p: Tensor, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(p.shape, dtype=self.correction_dtype, device=device)
        taken = take_correction(p)
        if taken is not None and taken.dtype != self.correction_dtype:
            raise ConfigurationError(
                f"SplitMasterAdamW: the weights were cast with {taken.dtype} corrections, and the optimizer keeps "
                f"{self.correction_dtype}. Give BF16Precision and the optimizer the same correction."
            )
        if taken is None:
            generator = torch.Generator().manual_seed(_SEED + self.num_drawn)
            self.num_drawn += 1
            taken = draw_correction(p, self.correction_dtype, generator)
        return taken.contiguous()

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step one contiguous tensor in place, block by block."""
        if p.dtype != torch.bfloat16:
            adamw_update(p, gradient, state, group)
            return
        flat = {name: value.view(-1) for name, value in state.items() if isinstance(value, Tensor)}
        step = _step_wide if "exp_avg" in state else _step_narrow
        rule = _Rule(state["step"], group)
        for start, stop in _pieces(p):
            piece = {
                name: value[start // MOMENT_BLOCK : -(-stop // MOMENT_BLOCK)]
                if name.endswith("_scale")
                else value[start:stop]
                for name, value in flat.items()
            }
            step(p.view(-1)[start:stop], gradient.view(-1)[start:stop].float(), piece, rule)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of parameters whose correction still waits for their first step."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p) and correction_of(p) is not None:
                    self.state[p] = {"step": 0, **self.new_state(p, group, p.device)}
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state in the dtypes it was saved in; corrections that came with a cast give way to it."""
        super().load_state_dict(state_dict)
        for p in self.state:
            take_correction(p)

    def _check_state(self, found: Mapping[str, Any], p: Tensor, group: Mapping[str, Any]) -> None:
        super()._check_state(found, p, group)
        held = found.get(CORRECTION_KEY)
        if held is not None and held.dtype != self.correction_dtype:
            raise CheckpointMismatchError(
                f"SplitMasterAdamW: the checkpoint holds {held.dtype} corrections, and the optimizer keeps "
                f"{self.correction_dtype}. Resume with the correction the checkpoint was written with."
            )


class _Rule:
    """The numbers of one step of one group."""

    def __init__(self, step: int, group: Mapping[str, Any]) -> None:
        self.step, self.group = step, group
        self.lr = float(group["lr"])
        self.beta1, self.beta2 = group["betas"]
        self.decay = 1 - self.lr * group["weight_decay"]
        self.root_factor = 1 / math.sqrt(1 - self.beta2**step)
        self.step_size = self.lr / (1 - self.beta1**step)


def _step_narrow(p: Tensor, gradient: Tensor, state: Mapping[str, Tensor], rule: _Rule) -> None:
    blocks = (-1, min(MOMENT_BLOCK, p.numel()))
    g = gradient.view(blocks)
    levels, roots = state["first"].view(blocks), state["second"].view(blocks)
    first = decode_first(levels, state["first_scale"]).lerp_(g, 1 - rule.beta1)
    second = decode_second(roots, state["second_scale"]).mul_(rule.beta2)
    root = second.addcmul_(g, g, value=1 - rule.beta2).sqrt_()
    encode_first(first, levels, state["first_scale"], rule.step)
    encode_second(root, roots, state["second_scale"], rule.step)
    weights = join(p, state[CORRECTION_KEY]).mul_(rule.decay).view(blocks)
    weights.addcdiv_(first, root.mul_(rule.root_factor).add_(rule.group["eps"]), value=-rule.step_size)
    split_into(weights.view(-1), p, state[CORRECTION_KEY], rule.step)


def _step_wide(p: Tensor, gradient: Tensor, state: Mapping[str, Tensor], rule: _Rule) -> None:
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.lerp_(gradient, 1 - rule.beta1)
    second.mul_(rule.beta2).addcmul_(gradient, gradient, value=1 - rule.beta2)
    weights = join(p, state[CORRECTION_KEY])
    apply_adamw(weights, first, second, rule.step, rule.lr, rule.group)
    split_into(weights, p, state[CORRECTION_KEY], rule.step)


def _pieces(p: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the pieces to step: whole blocks of moments, and what is left of the last one."""
    size = _BLOCK_ON_CPU if p.device.type == "cpu" else _BLOCK_ON_ACCELERATOR
    whole = p.numel() // MOMENT_BLOCK * MOMENT_BLOCK
    for start in range(0, whole, size):
        yield start, min(start + size, whole)
    if whole < p.numel():
        yield whole, p.numel()


def _check_dtypes(parameters: list[Tensor]) -> None:
    found = sorted({str(p.dtype) for p in parameters})
    if "torch.bfloat16" not in found or "torch.float16" in found:
        raise ConfigurationError(
            f"adamw_split_master trains bf16 weights, and the trainable parameters are {', '.join(found) or 'none'}. "
            'Write Trainer(plugins=[BF16Precision("split")]), which casts them and keeps what the cast would lose; '
            "leave precision= away."
        )


def split_master_state_bytes(p: Tensor, keeps_32bit: bool, options: Mapping[str, Any]) -> int:
    """Return the bytes of state of one parameter; the weight itself is not counted.

    Example:
        >>> split_master_state_bytes(torch.empty(64, 64, dtype=torch.bfloat16), False, {})
        12416

    """
    size = p.numel()
    if p.dtype != torch.bfloat16:
        return 2 * size * max(4, p.element_size())
    correction = CORRECTIONS[options.get("correction", "int8")].itemsize * size
    return correction + (moment_bytes(size) if has_narrow_moments(p, keeps_32bit, options) else 8 * size)


def has_narrow_moments(p: Tensor, keeps_32bit: bool, options: Mapping[str, Any]) -> bool:
    """Return whether the moments of a parameter are 8-bit."""
    minimum: int = options.get("min_8bit_size", MIN_NARROW_ELEMENTS)
    return p.dtype == torch.bfloat16 and not keeps_32bit and p.numel() >= minimum
