"""Check in the first steps that deferred logits stay deferred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace

from torch import nn

from lightning_memsave.memory.audit import Finding
from lightning_memsave.transforms._deferred_source import DeferCounts
from lightning_memsave.transforms.deferred_logits import defer_counts
from lightning_memsave.units import format_bytes

__all__ = ["count_deferred", "deferred_findings", "first_report"]

_CHECK = "logits"


def count_deferred(root: nn.Module) -> dict[str, DeferCounts]:
    """Return the counts of now, to compare with later."""
    return {
        name: replace(counts, materialised=counts.materialised.copy(), plain=counts.plain.copy())
        for name, counts in defer_counts(root).items()
    }


def deferred_findings(root: nn.Module, before: Mapping[str, DeferCounts]) -> Iterator[Finding]:
    """Yield what became of the logits since ``before``.

    Args:
        root: The module that trains.
        before: From ``count_deferred``.

    """
    for name, counts in defer_counts(root).items():
        yield _judge(name, _since(counts, before.get(name, DeferCounts())))


def first_report(root: nn.Module) -> list[tuple[str, bool]]:
    """Return a line for every head that did not save what it could, and whether it is a warning."""
    lines = []
    for name, counts in defer_counts(root).items():
        finding = _judge(name, counts)
        if finding.status != "ok":
            lines.append((finding.text, True))
        lines += [(note, False) for note in sorted(counts.notes)]
    return lines


def _since(now: DeferCounts, before: DeferCounts) -> DeferCounts:
    kept = ("materialised_bytes", "notes")
    changed = {f.name: getattr(now, f.name) - getattr(before, f.name) for f in fields(now) if f.name not in kept}
    return replace(now, **changed)


def _judge(name: str, counts: DeferCounts) -> Finding:
    if counts.materialised:
        by = ", ".join(f"{function} ({times})" for function, times in counts.materialised.most_common())
        size = format_bytes(counts.materialised_bytes)
        text = (
            f"{name}: full logits ({size}) were made for {by}. What stays small: F.cross_entropy, argmax, topk, "
            "logsumexp, gather, slices and views of the tokens, scaling by a number."
        )
        return Finding(_CHECK, "warning", text, (name,))
    if counts.plain:
        why = ", ".join(f"{reason} ({times})" for reason, times in counts.plain.most_common())
        return Finding(_CHECK, "warning", f"{name}: full logits were made, since {why}.", (name,))
    if not counts.deferred:
        text = (
            f"{name} deferred nothing: it was not called with gradients, or it is compiled, where its full logits are "
            "made. Compile the blocks instead of the whole model."
        )
        return Finding(_CHECK, "warning", text, (name,))
    text = f"{name}: {counts.losses} losses and {counts.reductions} other results ran in chunks, without full logits."
    return Finding(_CHECK, "ok", text, (name,))
