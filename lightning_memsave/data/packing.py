"""Several documents in one row: a data set of packs over a data set of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_memsave.data._bins import STRATEGIES, assign_bins
from lightning_memsave.data._samples import as_mapping, num_tokens, per_token_keys, read_rows, sample_lengths, tokens_of
from lightning_memsave.errors import ConfigurationError, raise_problems

__all__ = ["PackedDataset"]

Strategy = Literal["best_fit", "first_fit", "sequential"]
Overlong = Literal["error", "truncate", "split"]
_OVERLONG = ("error", "truncate", "split")


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Pack documents into rows of a fixed length, without cutting them.

    An item is one pack of at most ``sequence_length`` tokens: ``input_ids``, ``position_ids`` that start at 0 in every
    document, ``document_ids`` (0, 1, ...), and whatever else the samples have per token. Give packs to the model with
    ``PackingCollator``, which keeps the documents of a pack apart.

    **Saves** the padding: a batch padded to its longest sample holds ``batch_size * longest`` tokens in every
    activation, a batch of packs holds ``efficiency`` real tokens for each token of memory.
    **Costs** one read of all lengths (a ``datasets.Dataset`` is counted without reading tokens), about a second per
    million documents to pack them, and 16 bytes a document and 8 bytes a pack, in tensors that workers share.
    **Numerics** the order in which documents meet in a batch changes. The loss of a batch of packs is the mean over
    its tokens, as if every document were weighted by its length.

    Args:
        dataset: Samples that are dicts with ``input_ids`` and optionally ``labels``, ``attention_mask`` (its zeros are
            padding and left out) and more per token: a ``datasets.Dataset``, a list, any map-style data set. Samples
            without tokens are left out.
        sequence_length: Tokens in a pack, at most.
        strategy: ``best_fit`` (longest first, each into the fullest pack with room: fewest packs), ``first_fit`` (in
            the data set's order, each into the oldest pack with room) or ``sequential`` (in the data set's order, only
            into the last pack).
        overlong: Samples longer than ``sequence_length``: ``error``, ``truncate``, or ``split`` into documents of their
            own.
        keys: What to carry per token; None means all that the samples have.
        lengths: Tokens of each sample, if known already; otherwise they are counted once, here.

    Raises:
        ConfigurationError: If an argument is wrong, a sample has no ``input_ids``, is too long, or holds something that
            is not one number per token; the message says what to write instead.

    Example:
        >>> from lightning_memsave import PackedDataset
        >>> packs = PackedDataset([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], sequence_length=5)
        >>> packs[0]["input_ids"].tolist(), packs[0]["position_ids"].tolist(), packs.efficiency
        ([1, 2, 3, 4, 5], [0, 1, 2, 0, 1], 1.0)

    Source:
        Packing: Krell et al. 2021, https://arxiv.org/abs/2107.02027. Best fit without cutting documents: Ding et al.
        2024, https://arxiv.org/abs/2404.10830.

    """

    def __init__(
        self,
        dataset: Any,
        sequence_length: int,
        *,
        strategy: Strategy = "best_fit",
        overlong: Overlong = "error",
        keys: Sequence[str] | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> None:
        problems = []
        if sequence_length < 1:
            problems.append(f"sequence_length={sequence_length!r}: write a number of tokens, at least 1.")
        if strategy not in STRATEGIES:
            problems.append(f"strategy={strategy!r}: write one of {', '.join(map(repr, STRATEGIES))}.")
        if overlong not in _OVERLONG:
            problems.append(f"overlong={overlong!r}: write one of {', '.join(map(repr, _OVERLONG))}.")
        raise_problems("PackedDataset", problems)
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.strategy = strategy
        self.overlong = overlong
        self.lengths = self._lengths(lengths)
        samples, pieces, starts = self._pieces()
        first = int(samples[0])
        self.keys = per_token_keys(as_mapping(dataset[first], first, "PackedDataset"), keys, "PackedDataset")
        order, self._offsets = assign_bins(pieces, sequence_length, strategy)
        self._samples = samples[order]
        self._starts = None if starts is None else starts[order]
        self.num_tokens = int(pieces.sum())

    def _lengths(self, given: Sequence[int] | Tensor | None) -> Tensor:
        if given is None:
            lengths = sample_lengths(self.dataset, "PackedDataset")
        else:
            lengths = torch.as_tensor(given, dtype=torch.int64)
            if lengths.shape != (len(self.dataset),):
                raise ConfigurationError(
                    f"PackedDataset: lengths has shape {tuple(lengths.shape)} for {len(self.dataset)} samples; write "
                    "one number of tokens per sample."
                )
        if not (lengths > 0).any():
            raise ConfigurationError(f"PackedDataset: none of the {len(lengths)} samples has a token.")
        return lengths

    def _pieces(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the sample, the length and the first token (None: 0) of everything to pack."""
        limit = self.sequence_length
        samples = torch.nonzero(self.lengths).flatten()
        lengths = self.lengths[samples]
        longer = lengths > limit
        if self.overlong == "error" and longer.any():
            raise ConfigurationError(
                f"PackedDataset: {int(longer.sum())} of {len(self.lengths)} samples are longer than "
                f"sequence_length={limit} (the longest, sample {int(self.lengths.argmax())}, has "
                f"{int(lengths.max())} tokens). Write overlong='split' to make several documents of each, "
                "overlong='truncate' to drop their ends, or a larger sequence_length."
            )
        if self.overlong == "truncate" or not longer.any():
            return samples, lengths.clamp(max=limit), None
        counts = (lengths + limit - 1) // limit
        which = torch.repeat_interleave(torch.arange(len(samples)), counts)
        part = torch.arange(len(which)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        starts = part * limit
        return samples[which], (lengths[which] - starts).clamp(max=limit), starts

    @property
    def efficiency(self) -> float:
        """Share of real tokens if every pack is padded to ``sequence_length``."""
        return self.num_tokens / (len(self) * self.sequence_length)

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self._offsets) - 1

    def __repr__(self) -> str:
        return (
            f"PackedDataset({len(self._samples)} documents, {self.num_tokens} tokens in {len(self)} packs of "
            f"{self.sequence_length}, {self.strategy}: {self.efficiency:.1%} real tokens)"
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one pack: ``(T,)`` tensors, T <= ``sequence_length``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        begin, end = self._offsets[index % len(self)].item(), self._offsets[index % len(self) + 1].item()
        entries = range(int(begin), int(end))
        indices = self._samples[entries.start : entries.stop].tolist()
        rows = read_rows(self.dataset, indices)
        documents = [self._document(entry, sample, row) for entry, sample, row in zip(entries, indices, rows)]
        pack = {key: torch.cat([document[key] for document in documents]) for key in ("input_ids", *self.keys)}
        lengths = torch.tensor([len(document["input_ids"]) for document in documents])
        number = torch.arange(len(lengths))
        pack["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()])
        pack["document_ids"] = torch.repeat_interleave(number, lengths)
        return pack

    def _document(self, entry: int, sample: int, row: Any) -> dict[str, Tensor]:
        row = as_mapping(row, sample, "PackedDataset")
        found, expected = num_tokens(row), int(self.lengths[sample])
        if found != expected:
            raise ConfigurationError(
                f"PackedDataset: sample {sample} has {found} tokens and had {expected} when the packs were made; packs "
                "need a data set that returns the same tokens every time."
            )
        start = 0 if self._starts is None else cast("int", self._starts[entry].item())
        stop = start + self.sequence_length
        return {
            key: value[start:stop]
            for key, value in tokens_of(row, self.keys, f"PackedDataset: sample {sample}").items()
        }
