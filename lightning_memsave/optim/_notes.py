"""What a swap means, for the one line that is reported: bytes, update rule, options without effect."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memsave.optim._bitsandbytes import MIN_PAGED_ELEMENTS
from lightning_memsave.optim.local_shards import shard_of
from lightning_memsave.optim.registry import OptimizerRow, family_of
from lightning_memsave.optim.split_weights import correction_of
from lightning_memsave.optim.state_bytes import trainable_parameters

__all__ = ["rule_notes", "size_notes", "swapped_state_bytes"]


_DECOUPLED = re.compile("AdamW|Adam_?[mM]ini")


def swapped_state_bytes(
    optimizer: Optimizer, row: OptimizerRow, options: Mapping[str, Any], keep_32bit: Collection[int]
) -> int:
    """Return the bytes of state on this rank once every trainable parameter has stepped."""
    parameters = trainable_parameters(optimizer)
    tables = row.shared_bytes if any(row.has_narrow_state(p, id(p) in keep_32bit, options) for p in parameters) else 0
    total = tables
    for group in optimizer.param_groups:
        own = {**options, **{key: group[key] for key in row.options if key in group}}
        trained = [p for p in group["params"] if p.requires_grad]
        total += sum(row.state_bytes(shard_of(p), id(p) in keep_32bit, own) for p in trained)
    return total


def rule_notes(old: Optimizer, row: OptimizerRow, same_rule: bool) -> list[str]:
    """Return what changes in the mathematics of a step."""
    notes = []
    if not (same_rule and row.same_rule):
        notes.append(f"another update rule than {type(old).__name__}")
        notes += [row.rule_note] if row.rule_note else []
    cycles = any("max_momentum" in group for group in old.param_groups)  # written by OneCycleLR and CyclicLR
    if cycles and ("betas" if "betas" in old.defaults else "momentum") not in row.options:
        notes.append("the momentum that the scheduler cycles has no effect; the learning rate's cycle has")
    decays = any(group.get("weight_decay") for group in old.param_groups)
    coupled = not _DECOUPLED.search(type(old).__name__) and not any(
        g.get("decoupled_weight_decay") for g in old.param_groups
    )
    if decays and coupled and family_of(old) in ("adam", "other"):
        notes.append(
            f"weight_decay shrinks the weights directly now, no longer through the gradient as in {type(old).__name__}"
        )
    return notes


def size_notes(new: Optimizer, row: OptimizerRow, options: Mapping[str, Any], keep_32bit: Collection[int]) -> list[str]:
    """Return how many tensors an option reaches, and that it has no effect where it reaches none."""
    parameters = trainable_parameters(new)
    notes = []
    if row.bits < 32:
        narrow = sum(row.has_narrow_state(p, id(p) in keep_32bit, options) for p in parameters)
        if narrow == 0:
            notes.append(
                f"no effect: 0 of {len(parameters)} trainable tensors get {row.bits}-bit state "
                "(small, embedding or norm)"
            )
        else:
            notes.append(f"{row.bits}-bit state for {narrow} of {len(parameters)} trainable tensors")
    elif row.reaches is not None:
        own = sum(row.reaches(p, id(p) in keep_32bit, options) for p in parameters)
        effect = "" if own else "no effect: "
        notes.append(f"{effect}{row.title} steps {own} of {len(parameters)} trainable tensors, AdamW the others")
    if row.paged:
        large = sum(shard_of(p).numel() >= MIN_PAGED_ELEMENTS for p in parameters)
        if all(p.device.type == "cpu" for p in parameters):
            notes.append("paging has no effect on the CPU")
        else:
            notes.append(
                f"{large} of {len(parameters)} trainable tensors are large enough to be paged (>= 1e5 elements)"
            )
    if row.name == "adamw_split_master":
        half = [p for p in parameters if p.dtype == torch.bfloat16]
        unknown = sum(correction_of(p) is None for p in half)
        if unknown:
            notes.append(
                f"the fp32 values of {unknown} of {len(half)} bf16 tensors are not known, so their corrections are "
                'drawn; plugins=[BF16Precision("split")] keeps what its cast of fp32 weights would lose'
            )
    if any(isinstance(p, DTensor) for p in parameters):
        notes.append("steps on this rank's shards")
    return notes
