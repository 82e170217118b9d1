"""Check in the first steps that recomputed blocks recompute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import nn

from lightning_memsave.memory.audit import Finding, listed
from lightning_memsave.transforms.checkpoint_blocks import RecomputeCounts, inactive_regularization, recompute_counts

__all__ = ["count_recomputes", "recompute_findings"]


def count_recomputes(root: nn.Module) -> dict[str, RecomputeCounts]:
    """Return the counts of now, to compare with later."""
    return {name: dataclasses.replace(counts) for name, counts in recompute_counts(root).items()}


def recompute_findings(
    root: nn.Module, before: Mapping[str, RecomputeCounts], *, backwards: int = 1
) -> Iterator[Finding]:
    """Yield what the recomputed blocks did since ``before``.

    Args:
        root: The module that trains.
        before: From ``count_recomputes``.
        backwards: How often the backward of one forward may run, each time with a recompute.

    """
    none = RecomputeCounts()
    now = recompute_counts(root)
    since = {
        name: RecomputeCounts(
            *(getattr(counts, f.name) - getattr(before.get(name, none), f.name) for f in dataclasses.fields(counts))
        )
        for name, counts in now.items()
    }
    modules = dict(root.named_modules())
    compiled = {name for name in since if _is_compiled(name, modules)}
    if compiled:
        text = f"{len(compiled)} blocks are compiled: the compiler recomputes them, uncounted."
        yield Finding("recomputation", "ok", text, tuple(compiled))
    watched = {name: counts for name, counts in since.items() if name not in compiled}
    if watched:
        yield from _judge(watched, backwards)
    silent = inactive_regularization(root)
    if silent:
        yield Finding("eval mode", "warning", silent)


def _is_compiled(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a module or one it is in is compiled, by any of the three ways."""
    parts = name.split(".")
    chain = [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
    return any(
        getattr(module, "_compiled_call_impl", None) is not None  # module.compile()
        or getattr(module, "_compiler_ctx", None) is not None  # torch.compile(a LightningModule)
        or type(module).__name__ == "OptimizedModule"  # torch.compile(module)
        for module in chain
    )


def _judge(since: Mapping[str, RecomputeCounts], backwards: int) -> Iterator[Finding]:
    def names(choose: object) -> tuple[str, ...]:
        return tuple(name for name, counts in since.items() if choose(counts))  # type: ignore[operator]

    active = names(lambda c: c.recomputed)
    again = sum(since[name].recomputed for name in active)
    calls = sum(since[name].calls for name in active)
    silent = names(lambda c: c.calls and not c.recomputed)
    passed = names(lambda c: c.passed and not c.calls)
    absent = names(lambda c: not c.passed and not c.calls)
    if active:
        text = f"{len(active)} of {len(since)} blocks ran again in backward ({again} recomputes of {calls} forwards"
        text += f"; a backward may run {backwards} times)." if backwards > 1 else ")."
        yield Finding("recomputation", "ok" if again <= backwards * calls else "warning", text)
    if silent:
        text = f"{len(silent)} blocks ran, and no backward came back to them: {listed(silent)}."
        yield Finding("recomputation", "warning", text, silent)
    if passed:
        text = f"{len(passed)} blocks ran only without gradients, so there was nothing to save: {listed(passed)}."
        yield Finding("recomputation", "warning", text, passed)
    if absent:
        text = f"{len(absent)} blocks were never called: {listed(absent)}."
        yield Finding("recomputation", "warning", text, absent)
    if not active:
        yield Finding(
            "recomputation",
            "problem",
            f"none of the {len(since)} selected blocks was recomputed: activation checkpointing saves nothing. Select "
            "the modules whose forward runs with gradients.",
            tuple(since),
        )
