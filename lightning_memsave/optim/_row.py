"""What one optimizer name stands for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.optim._bitsandbytes import MIN_8BIT_ELEMENTS
from lightning_memsave.optim.local_shards import BlockState, whole

__all__ = ["Family", "Group", "OptimizerRow", "family_of", "with_tuples"]

Family = Literal["adam", "lion", "adafactor", "came", "muon", "other"]
Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """One optimizer that ``LowMemoryOptimizer`` can build.

    Args:
        name: The public name, lower snake case, width last.
        title: The class that is built.
        family: Optimizers of one family read the hyper-parameters in ``shared`` in the same way.
        shared: Group keys that keep their value when the old optimizer is of the same family; ``lr`` and
            ``weight_decay`` always do.
        options: What ``options`` may hold.
        build: ``(groups, options, ids of the parameters with 32-bit state) -> optimizer``.
        state_bytes: ``(parameter, keeps 32-bit state, options) -> bytes``.
        state: The formula of ``state_bytes`` in words, for the docs: bytes a value.
        numerics: How its steps differ from AdamW's, for the docs.
        source: The paper.
        carry: ``(old optimizer, one of its groups) -> keys of the new group``, for what ``shared`` cannot say: other
            names, another family.
        reaches: ``(parameter, keeps 32-bit state, options) -> whether it is stepped by the row's own rule``, where some
            parameters are not: those have the state of AdamW.
        shared_bytes: State that exists once, where any tensor has narrow state (the quantization tables).
        master: Bytes a value that stand for fp32 weights beside 16-bit ones.
        bits: Width of a state value.
        library: The package that holds the class.
        paged: State of large tensors moves to the host when the accelerator is full.
        maximizes: ``maximize=True`` is honoured.
        same_rule: The update approximates that of its family; otherwise ``rule_note`` is said in any case.
        rule_note: What to know about the learning rate or the rule when it is not that of the old optimizer.
        matrices_only: The rule is made for hidden matrices, so that heads are treated as embeddings are.
        group_state: It keeps state of a whole group, so it cannot step one parameter at a time.
        local_shards: Stepping on some rows of a tensor is the same as stepping on the whole tensor.
        blocks: The moments that are codes with one scale a block, for checkpoints of sharded parameters.

    """

    name: str
    title: str
    family: Family
    shared: tuple[str, ...]
    options: tuple[str, ...]
    build: Callable[[Sequence[Group], Mapping[str, Any], Collection[int]], Optimizer]
    state_bytes: Callable[[Tensor, bool, Mapping[str, Any]], int]
    state: str
    numerics: str
    source: str
    carry: Callable[[Optimizer, Mapping[str, Any]], Group] | None = None
    reaches: Callable[[Tensor, bool, Mapping[str, Any]], bool] | None = None
    shared_bytes: int = 0
    master: str = "0"
    bits: int = 32
    library: Literal["bitsandbytes", "lightning_memsave", "torch"] = "bitsandbytes"
    paged: bool = False
    maximizes: bool = False
    same_rule: bool = True
    rule_note: str = ""
    matrices_only: bool = False
    group_state: bool = False
    local_shards: bool = False
    blocks: tuple[BlockState, ...] = ()

    def has_narrow_state(self, p: Tensor, keeps_32bit: bool, options: Mapping[str, Any]) -> bool:
        """Return whether the state of ``p`` will be narrower than 32 bits."""
        if self.bits < 32 and self.reaches is not None:
            return self.reaches(p, keeps_32bit, options)
        minimum = options.get("min_8bit_size", MIN_8BIT_ELEMENTS)
        return self.bits < 32 and not keeps_32bit and whole(p).numel() >= minimum


def with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with tuples for lists: YAML has lists only."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


_RULES: dict[str, Family] = {
    **dict.fromkeys(("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"), "adam"),
    # these read betas and eps as Adam does
    **dict.fromkeys(("GaLoreAdamW", "ApolloAdamW", "APOLLOAdamW", "AdamMini", "Adam_mini", "SplitMasterAdamW"), "adam"),
    **dict.fromkeys(("Adafactor", "AdaLomo"), "adafactor"),
    "CAME": "came",
    "Lion": "lion",
    "Muon": "muon",
}
_WIDTHS = ("4bit", "8bit", "32bit", "Fp8")


def family_of(optimizer: Optimizer) -> Family:
    """Return which update rule an optimizer follows, by the names of its classes.

    Example:
        >>> import torch
        >>> family_of(torch.optim.NAdam([torch.zeros(1)]))
        'other'

    """
    for cls in type(optimizer).__mro__:
        name = cls.__name__.removeprefix("Paged")
        for width in _WIDTHS:
            name = name.removesuffix(width)
        if name in _RULES:
            return _RULES[name]
    return "other"
