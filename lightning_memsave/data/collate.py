"""Batches of packs, in the form that keeps documents apart under each attention implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memsave.data._forms import FORMS, choose_form, forms_for
from lightning_memsave.data._isolation import check_isolation
from lightning_memsave.data._samples import as_mapping, per_token_keys, tokens_of
from lightning_memsave.data.masks import document_mask
from lightning_memsave.errors import ConfigurationError, raise_problems

__all__ = ["PackingCollator"]

Attention = Literal["auto", "positions", "flash", "mask", "additive", "documents"]
_OURS = ("position_ids", "document_ids")
_IGNORED = -100


class PackingCollator:
    """Collate packs so that no document of a row sees another one.

    Position ids alone do not keep documents apart: transformers ignores their restarts as soon as a batch has an
    ``attention_mask`` (even one of ones), or ``use_cache`` is on (it is, by default). What keeps them apart depends on
    the attention implementation, and this emits what it needs beside ``input_ids`` and ``labels``:

    * ``positions`` (``sdpa``, ``eager`` and ``flex_attention`` of transformers, causal models): ``position_ids`` that
      restart, ``use_cache=False``, no mask.
    * ``flash`` (flash attention of transformers): the same, in one row without padding, and ``cu_seq_lens_q/k``,
      ``max_length_q/k``.
    * ``mask`` (``sdpa``, bidirectional models too): ``position_ids``, bool ``attention_mask`` ``(B, 1, T, T)``.
    * ``additive`` (``eager``, bidirectional models too): the same, float32.
    * ``documents`` (attention of your own, with ``document_mask``): ``position_ids``, ``document_ids``.

    With a ``config``, ``auto`` is ``flash`` if it says so, ``mask`` or ``additive`` for bidirectional models and those
    known to ignore positions, and refuses recurrent ones. Otherwise, and without a config, it is ``positions`` together
    with the lengths of ``flash``: right under every implementation of the models that read positions, also if it is
    changed later. (Write ``positions`` if your model takes no such lengths, or is compiled.) ``check(model)`` proves it
    on yours, and ``PackingCollator.for_model(model)`` chooses by such proofs.

    **Saves** padding, see ``PackedDataset``.
    **Costs** under ``sdpa`` and ``eager`` a mask of ``batch * tokens**2`` bytes, which the model builds on its device
    (``positions``) or the loader sends (``mask``, ``additive``: times 4). ``flash`` and ``flex_attention`` have none.
    **Numerics** logits of a document are those of the document alone, to rounding; other documents change no bit of
    them. The first token of a document is predicted from nothing: its label is -100.

    Args:
        attention: The form of a batch.
        config: ``model.config`` of a transformers model; read by ``auto``.
        causal: Whether tokens see no later ones. Without it labels are left as they are (masked language models);
            encoders of transformers take such masks from version 5 on.
        pad_token_id: Id at the padding of shorter rows; nothing sees it.
        length: Tokens of a row, to pad to; None pads to the longest row of the batch. ``flash`` has no padding.

    Raises:
        ConfigurationError: If an argument is wrong, or ``config`` is of a model that cannot be packed in this form.

    Example:
        >>> from lightning_memsave import PackedDataset, PackingCollator
        >>> packs = PackedDataset([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], sequence_length=5)
        >>> batch = PackingCollator("flash")([packs[0]])
        >>> batch["labels"].tolist(), batch["cu_seq_lens_q"].tolist()
        ([[-100, 2, 3, -100, 5]], [0, 3, 5])

    Source:
        transformers 5.23, ``masking_utils.find_packed_sequence_indices`` and ``modeling_flash_attention_utils``.

    """

    def __init__(
        self,
        attention: Attention = "auto",
        *,
        config: Any = None,
        causal: bool = True,
        pad_token_id: int = 0,
        length: int | None = None,
    ) -> None:
        problems = []
        if attention not in FORMS:
            problems.append(f"attention={attention!r}: write one of {', '.join(map(repr, FORMS))}.")
        if attention == "positions" and not causal:
            problems.append(
                "attention='positions' with causal=False: bidirectional models read no document from positions; write "
                "'mask' (sdpa), 'additive' (eager) or 'flash'."
            )
        if length is not None and length < 1:
            problems.append(f"length={length}: write a number of tokens, at least 1, or None.")
        raise_problems("PackingCollator", problems)
        self.attention = attention
        self.config = config
        self.causal = causal
        self.pad_token_id = pad_token_id
        self.length = length
        self.form = choose_form(attention, config, causal)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of packs; a sample without ``document_ids`` is one document."""
        rows = [self._row(index, sample) for index, sample in enumerate(samples)]
        lengths = [_document_lengths(row["document_ids"]) for row in rows]
        if self.form == "flash":
            flat = {key: torch.cat([row[key] for row in rows])[None] for key in rows[0] if key != "document_ids"}
            return {**flat, "use_cache": False, **_flash_arguments(torch.cat(lengths))}
        width = max([len(row["input_ids"]) for row in rows] if self.length is None else [self.length])
        batch: dict[str, Any] = {key: torch.stack([self._padded(key, row, width) for row in rows]) for key in rows[0]}
        documents = batch.pop("document_ids")
        if self.form == "documents":
            batch["document_ids"] = documents
        elif self.form in {"mask", "additive"}:
            batch["attention_mask"] = document_mask(
                documents, form="bool" if self.form == "mask" else "additive", causal=self.causal
            )
        else:
            batch["use_cache"] = False
        if self.form == "any":
            # The padding of a row is a document here: these lengths have to cover every token.
            batch |= _flash_arguments(torch.cat([_document_lengths(row) for row in documents]))
        return batch

    def check(
        self,
        model: nn.Module,
        *,
        forward: Callable[[dict[str, Any]], Tensor] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """Run the model on packs that differ in one document, and raise if another document notices.

        Three small forward passes in ``eval()`` mode without gradients; the module is put back as it was.

        Args:
            model: The network, on the device it runs on.
            forward: Returns logits ``(B, T, ...)`` for a batch; by default ``model(**batch)``, its ``logits``, its
                ``last_hidden_state`` or its first result.
            vocabulary: Ids are drawn below it; by default the size of the model's token embedding.

        Raises:
            ConfigurationError: If documents see each other, or a packed document has other logits than alone.

        """
        check_isolation(self, model, forward, vocabulary)

    @classmethod
    def for_model(
        cls, model: nn.Module, *, causal: bool = True, pad_token_id: int = 0, length: int | None = None
    ) -> PackingCollator:
        """Return the collator with the lightest form that ``check`` proves right on a transformers model.

        Args:
            model: The network, on the device it runs on.
            causal: As for the class.
            pad_token_id: As for the class.
            length: As for the class.

        Raises:
            ConfigurationError: If no form keeps documents apart; the message says what each one did.

        """
        failures = []
        for form in forms_for(getattr(model, "config", None), causal):
            try:
                collator = cls(form, config=None, causal=causal, pad_token_id=pad_token_id, length=length)
                collator.check(model)
            except (ConfigurationError, TypeError, ValueError, RuntimeError) as error:
                failures.append(f"attention={form!r}: {type(error).__name__}: {error}")
            else:
                return collator
        raise_problems(f"PackingCollator.for_model({type(model).__name__})", failures)
        raise AssertionError("a form returned or failed")

    def _row(self, index: int, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        subject = "PackingCollator"
        sample = as_mapping(sample, index, subject)
        packed = "document_ids" in sample
        keys = [key for key in per_token_keys(sample, None, subject) if key not in _OURS]
        row = tokens_of(sample, [*keys, *(_OURS if packed else ())], f"{subject}: sample {index}")
        count = len(row["input_ids"])
        if not count:
            raise ConfigurationError(f"{subject}: sample {index} has no tokens; leave it out of the data set.")
        if self.form != "flash" and self.length is not None and count > self.length:
            raise ConfigurationError(
                f"{subject}: sample {index} has {count} tokens, more than length={self.length}; write "
                f"length={count} or PackedDataset(..., sequence_length={self.length})."
            )
        if not packed:
            row["position_ids"] = torch.arange(count)
            row["document_ids"] = torch.zeros(count, dtype=torch.int64)
        if self.causal:
            labels = row.get("labels", row["input_ids"]).clone()
            labels[row["position_ids"] == 0] = _IGNORED
            row["labels"] = labels
        return row

    def _padded(self, key: str, row: dict[str, Tensor], width: int) -> Tensor:
        value = row[key]
        missing = width - len(value)
        if not missing:
            return value
        if key == "position_ids" and self.form in {"positions", "any"}:
            # Padding goes on as if it were of the last document, which does not see it: a row of one document then
            # stays plainly causal, and needs no mask at all.
            return torch.cat([value, torch.arange(missing) + value[-1] + 1])
        if key == "position_ids":
            return torch.cat([value, torch.arange(missing)])
        if key == "document_ids":
            return F.pad(value, (0, missing), value=int(value[-1]) + 1)
        fill = {"labels": _IGNORED, "input_ids": self.pad_token_id}.get(key, 0)
        return F.pad(value, (*(0, 0) * (value.ndim - 1), 0, missing), value=fill)


def _document_lengths(document_ids: Tensor) -> Tensor:
    return cast("Tensor", torch.unique_consecutive(document_ids, return_counts=True)[1])


def _flash_arguments(lengths: Tensor) -> dict[str, Any]:
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
