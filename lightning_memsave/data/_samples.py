"""Read tokenized samples: what a sample holds for each token, and how many tokens each one has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsave._imports import require
from lightning_memsave.errors import ConfigurationError

__all__ = ["per_token_keys", "read_rows", "sample_lengths", "tokens_of"]

_ROWS_AT_A_TIME = 10_000


def as_mapping(sample: object, index: int, subject: str) -> Mapping[str, Any]:
    """Return a sample that has ``input_ids``, or raise."""
    if not isinstance(sample, Mapping):
        raise ConfigurationError(
            f"{subject}: sample {index} is a {type(sample).__name__}; write samples that are dicts with 'input_ids'."
        )
    if "input_ids" not in sample:
        raise ConfigurationError(
            f"{subject}: sample {index} has {sorted(sample)} and no 'input_ids'; tokenize the data set first."
        )
    return sample


def num_tokens(sample: Mapping[str, Any]) -> int:
    """Return the number of tokens that ``attention_mask``, if there is one, does not call padding."""
    mask = sample.get("attention_mask")
    return len(sample["input_ids"]) if mask is None else int(torch.count_nonzero(torch.as_tensor(mask)))


def per_token_keys(sample: Mapping[str, Any], keys: Sequence[str] | None, subject: str) -> tuple[str, ...]:
    """Return what to carry beside ``input_ids``, or raise when a key is not one value per token."""
    length = len(sample["input_ids"])
    asked = [k for k in (sample if keys is None else keys) if k not in {"input_ids", "attention_mask"}]
    missing = [key for key in asked if key not in sample]
    if missing:
        raise ConfigurationError(f"{subject}: keys={missing} are not in the samples, which have {sorted(sample)}.")
    wrong = [key for key in asked if not _is_per_token(sample[key], length)]
    if wrong:
        kept = ["input_ids", *(key for key in asked if key not in wrong)]
        raise ConfigurationError(
            f"{subject}: {wrong} do not have one number per token, so a pack of several documents cannot hold them. "
            f"To leave them out write keys={kept}."
        )
    return tuple(asked)


def _is_per_token(value: object, length: int) -> bool:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        return False
    try:
        return torch.as_tensor(value).shape[:1] == (length,)
    except (TypeError, ValueError, RuntimeError):
        return False


def tokens_of(sample: Mapping[str, Any], keys: Sequence[str], subject: str) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``keys`` of a sample as tensors, without the tokens its mask calls padding.

    Raises:
        ConfigurationError: If a key is missing, or has not one value per token.

    """
    missing = [key for key in keys if key not in sample]
    values = {key: torch.as_tensor(sample[key]) for key in ("input_ids", *keys) if key not in missing}
    length = len(values["input_ids"])
    wrong = {key: tuple(value.shape) for key, value in values.items() if value.shape[:1] != (length,)}
    if missing or wrong:
        found = f"lacks {missing}" if missing else f"has {length} input_ids and shapes {wrong}"
        raise ConfigurationError(f"{subject} {found}; every sample needs one value per token of every key.")
    mask = sample.get("attention_mask")
    if mask is not None:
        real = torch.as_tensor(mask).bool()
        values = {key: value[real] for key, value in values.items()}
    return {key: value.long() if key in {"input_ids", "labels"} else value for key, value in values.items()}


def read_rows(dataset: Any, indices: list[int]) -> list[Any]:
    """Return several samples, in one read where the data set can."""
    read = getattr(dataset, "__getitems__", None)
    return list(read(indices)) if callable(read) else [dataset[index] for index in indices]


def sample_lengths(dataset: Any, subject: str) -> Tensor:
    """Count the tokens of every sample once.

    A ``datasets.Dataset`` is counted from its Arrow offsets, 10,000 rows at a time, without reading tokens; anything
    else is read sample by sample.

    Returns:
        ``(len(dataset),)`` int64.

    Raises:
        ConfigurationError: If the data set has no length, or samples without ``input_ids``.

    """
    try:
        count = len(dataset)
    except TypeError:
        raise ConfigurationError(
            f"{subject} needs a data set with a length, and {type(dataset).__name__} has none: packing reads all "
            "lengths first."
        ) from None
    if _is_arrow(dataset):
        return _arrow_lengths(dataset, count)
    lengths = [num_tokens(as_mapping(dataset[index], index, subject)) for index in range(count)]
    return torch.tensor(lengths, dtype=torch.int64)


def _is_arrow(dataset: Any) -> bool:
    """Whether this is a ``datasets.Dataset`` whose rows are its columns (no transform runs when one is read)."""
    made_by_datasets = type(dataset).__module__.split(".")[0] == "datasets" and hasattr(dataset, "with_format")
    return made_by_datasets and dataset.format["type"] != "custom" and "input_ids" in dataset.column_names


def _arrow_lengths(dataset: Any, count: int) -> Tensor:
    compute = require("pyarrow.compute", "reading the lengths of a datasets.Dataset")
    columns = [c for c in ("input_ids", "attention_mask") if c in dataset.column_names]
    tables = dataset.select_columns(columns).with_format("arrow")
    parts = []
    for start in range(0, count, _ROWS_AT_A_TIME):
        table = tables[start : min(start + _ROWS_AT_A_TIME, count)]
        lengths = torch.tensor(compute.list_value_length(table["input_ids"]).to_pylist(), dtype=torch.int64)
        if "attention_mask" in columns:
            flat = compute.list_flatten(table["attention_mask"])
            if not compute.min(flat).as_py():
                # Sums of runs by differences of a running sum.
                total = torch.as_tensor(flat.to_pylist(), dtype=torch.bool).cumsum(0)
                ends = torch.cat([torch.zeros(1, dtype=torch.int64), total])[lengths.cumsum(0)]
                lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
        parts.append(lengths)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
