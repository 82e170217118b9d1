"""The optimizers of bitsandbytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave._imports import require
from lightning_memsave.optim._bitsandbytes import BLOCKS, block_state_bytes, finish
from lightning_memsave.optim._row import Family, Group, OptimizerRow, with_tuples

__all__ = ["ROWS"]

_LION_RATE = "Lion wants a learning rate 3 to 10 times smaller than AdamW's; it was kept"
_SOURCES = {
    "adam": "Dettmers et al. 2022, https://arxiv.org/abs/2110.02861",
    "lion": "Chen et al. 2023, https://arxiv.org/abs/2302.06675",
}


def _row(name: str, title: str, family: Family, num_moments: int, bits: int, paged: bool = False) -> OptimizerRow:
    def build(groups: Sequence[Group], options: Mapping[str, Any], keep_32bit: Collection[int]) -> Optimizer:
        library = require("bitsandbytes.optim", f"LowMemoryOptimizer({name!r})")
        optimizer = getattr(library, title)(groups, **with_tuples(options))
        return finish(optimizer, keep_32bit=keep_32bit, num_moments=num_moments)

    def state_bytes(p: Tensor, keeps_32bit: bool, options: Mapping[str, Any]) -> int:
        if row.has_narrow_state(p, keeps_32bit, options):
            return block_state_bytes(p.numel(), num_moments)
        return num_moments * 4 * p.numel()

    rule = "AdamW" if family == "adam" else "Lion (sign of an averaged gradient)"
    row = OptimizerRow(
        name=name,
        title=title,
        family=family,
        shared=("betas", "eps") if family == "adam" else ("betas",),
        options=("betas", "weight_decay")
        + (("eps",) if family == "adam" else ())
        + (("min_8bit_size",) if bits == 8 else ()),
        build=build,
        state_bytes=state_bytes,
        state=f"{num_moments} + {4 * num_moments}/256" if bits == 8 else str(4 * num_moments),
        numerics=f"{rule}, moments in 8 bits, a scale every 256 values" if bits == 8 else rule,
        source=_SOURCES[family],
        shared_bytes=num_moments * 256 * 4 if bits == 8 else 0,
        bits=bits,
        paged=paged,
        rule_note=_LION_RATE if family == "lion" else "",
        local_shards=True,
        blocks=BLOCKS[:num_moments] if bits == 8 else (),
    )
    return row


ROWS = (
    _row("adamw_8bit", "AdamW8bit", "adam", num_moments=2, bits=8),
    _row("paged_adamw_8bit", "PagedAdamW8bit", "adam", num_moments=2, bits=8, paged=True),
    _row("paged_adamw_32bit", "PagedAdamW32bit", "adam", num_moments=2, bits=32, paged=True),
    _row("lion_8bit", "Lion8bit", "lion", num_moments=1, bits=8),
    _row("lion", "Lion32bit", "lion", num_moments=1, bits=32),
)
