"""Masks that keep the documents of a row apart."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memsave.errors import raise_problems

__all__ = ["document_mask"]

Form = Literal["bool", "additive", "block"]
_FORMS = ("bool", "additive", "block")


def document_mask(
    document_ids: Tensor,
    *,
    form: Form = "bool",
    causal: bool = True,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return the attention mask under which no token sees another document.

    For attention of your own: build it in ``forward`` from the ``document_ids`` that ``PackingCollator("documents")``
    emits, on their device, so that no mask travels from the loader.

    **Costs** ``batch * tokens**2`` bytes for ``bool``, times the size of ``dtype`` for ``additive``; ``block`` has one
    entry per 128 x 128 tokens, and skips the blocks between documents.

    Args:
        document_ids: ``(B, T)``, equal numbers for tokens of one document. Padding has a number of its own.
        form: ``bool`` for ``F.scaled_dot_product_attention``, ``additive`` to add to scores, ``block`` a ``BlockMask``
            for ``flex_attention``.
        causal: Whether a token also sees no later one.
        window: Tokens that a token sees at most, itself included, to the left (and without ``causal`` to the right).
        dtype: Of the ``additive`` form: the dtype of the scores.

    Returns:
        ``(B, 1, T, T)`` tensor, or a ``BlockMask`` for any number of heads.

    Raises:
        ConfigurationError: If an argument is wrong.

    Example:
        >>> import torch
        >>> from lightning_memsave import document_mask
        >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)

    Source:
        ``BlockMask``: Dong et al. 2024, https://arxiv.org/abs/2412.05496, section 4.

    """
    problems = []
    if document_ids.ndim != 2:
        problems.append(f"document_ids of shape {tuple(document_ids.shape)}: write (batch, tokens).")
    if form not in _FORMS:
        problems.append(f"form={form!r}: write one of {', '.join(map(repr, _FORMS))}.")
    if window is not None and window < 1:
        problems.append(f"window={window}: write a number of tokens, at least 1, or None.")
    raise_problems("document_mask", problems)

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = document_ids[b, q] == document_ids[b, k]
        if causal:
            seen = seen & (q >= k)
        if window is not None:
            seen = seen & ((q - k).abs() < window)
        return seen

    batch, tokens = document_ids.shape
    device = document_ids.device
    if form == "block":
        from torch.nn.attention.flex_attention import create_block_mask

        # Compiled, it never holds (tokens, tokens) entries; compiling for the CPU costs more than it saves.
        return create_block_mask(visible, batch, None, tokens, tokens, device=device, _compile=device.type == "cuda")
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    position = torch.arange(tokens, device=device)
    mask = visible(row, None, position.view(1, 1, -1, 1), position.view(1, 1, 1, -1))
    if form == "bool":
        return mask
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=device), hidden)
