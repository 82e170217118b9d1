"""Prove on a model that the documents of a pack do not see each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_memsave.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_memsave.data.collate import PackingCollator

__all__ = ["check_isolation"]

# Tokens of the two documents of the probe's pack, and of the row beside it, which is longer so that the pack is padded.
_LENGTHS = (7, 11)
_BESIDE = 23


def check_isolation(
    collator: PackingCollator,
    model: nn.Module,
    forward: Callable[[dict[str, Any]], Tensor] | None,
    vocabulary: int | None,
) -> None:
    """See ``PackingCollator.check``."""
    first, second = _LENGTHS
    generator = torch.Generator().manual_seed(0)
    size = vocabulary or _vocabulary(model)
    one, other, watched, beside = (
        torch.randint(size, (n,), generator=generator) for n in (first, first, second, _BESIDE)
    )
    # Different in every token, whatever was drawn.
    other = torch.where(other == one, (one + 1) % size, other)
    run = _Run(model, forward)
    with run:
        packed = [run(collator([_pack(document, watched), _pack(beside)])) for document in (one, other)]
        alone = run(collator([_pack(watched)]) if forward else {"input_ids": watched[None]})
    before, after = (_tokens(logits)[first : first + second].double() for logits in packed)
    reference = _tokens(alone)[:second].double()
    scale = float(reference.abs().max()) or 1.0
    eps = torch.finfo(alone.dtype).eps
    leak = float((before - after).abs().max()) / scale
    if not leak <= 16 * eps:
        raise ConfigurationError(
            f"PackingCollator({collator.attention!r}): documents see each other in {type(model).__name__}: logits of a "
            f"document change by {leak:.1%} of the largest when the document before it changes. {_advice(collator)}"
        )
    error = float((before - reference).abs().max()) / scale
    if not error <= eps**0.5:
        raise ConfigurationError(
            f"PackingCollator({collator.attention!r}): logits of a packed document in {type(model).__name__} are off "
            f"by {error:.1%} of the largest, against the document alone: its positions do not restart, or do not "
            f"start at 0. {_advice(collator)}"
        )


def _advice(collator: PackingCollator) -> str:
    if collator.form == "documents":
        return "Build the mask from document_ids with document_mask, and read position_ids."
    return (
        "PackingCollator.for_model(model) looks for a form that keeps them apart; if there is none, use "
        "LengthGroupedSampler instead of packing."
    )


def _pack(*documents: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat(documents),
        "position_ids": torch.cat([torch.arange(len(d)) for d in documents]),
        "document_ids": torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)]),
    }


def _tokens(logits: Tensor) -> Tensor:
    """Return the first row's; under ``flash`` all rows are one."""
    return logits[0]


def _vocabulary(model: nn.Module) -> int:
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    if embedding is None:
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise ConfigurationError("PackingCollator.check: the model has no token embedding; write vocabulary=...")
    return int(embedding.weight.shape[0])


class _Run:
    """Call a model in ``eval()`` mode without gradients, and put back its modes."""

    def __init__(self, model: nn.Module, forward: Callable[[dict[str, Any]], Tensor] | None) -> None:
        self.model, self.forward = model, forward
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self.no_grad = torch.no_grad()
        self.no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self.no_grad.__exit__(*error)
        for module, mode in self.modes.items():
            module.training = mode

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        result: Any = self.forward(batch) if self.forward else self.model(**batch)
        if isinstance(result, Tensor):
            return result
        for name in ("logits", "last_hidden_state"):
            found = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
            if isinstance(found, Tensor):
                return found
        return cast("Tensor", result[0])
