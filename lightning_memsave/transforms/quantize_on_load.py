"""Quantize while transformers loads, so that host memory never holds the full-precision model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from lightning_memsave._imports import require
from lightning_memsave.transforms._selection import HEAD_NAMES
from lightning_memsave.transforms.quantization import Quantization

__all__ = ["quantization_config"]


def quantization_config(settings: Quantization) -> Any:
    """Return the ``BitsAndBytesConfig`` that makes ``from_pretrained`` quantize each weight as it is read.

    Peak host memory is the quantized model plus two copies of its largest weight (as it is read, and in the dtype it is
    quantized from; transformers 4 holds two more), instead of the whole model in its stored dtype. Blocks below 32 MiB
    go back to glibc's heap, which may keep them: half of a small model was seen to stay. ``MALLOC_MMAP_THRESHOLD_`` or
    another allocator avoids it.

    Heads are named, since transformers finds only the vocabulary's: it would quantize the classifier of an encoder.

    Args:
        settings: What and how. Of ``skip`` and ``train`` module names count here, class names do not; what they select
            and is quantized nevertheless is refused at ``fit``.

    Raises:
        MissingDependencyError: Without transformers, bitsandbytes or accelerate.

    """
    transformers = require("transformers", f"{settings.subject}.loading_config()")
    require("bitsandbytes", f"{settings.subject}.loading_config()")
    require("accelerate", f"{settings.subject}.loading_config()")
    skipped = _patterns((*settings.skip, *settings.train))
    if settings.kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.kind,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=settings.compute_dtype or torch.float32,
        llm_int8_skip_modules=skipped,
    )


def _patterns(globs: Iterable[str]) -> list[str]:
    """Return the heads and the globs as names and regular expressions.

    transformers 4 compares names only, 5 takes expressions. The names of a LightningModule begin with an attribute that
    the model inside does not have, so every tail of a glob counts.
    """
    tails = [".".join(parts[i:]) for parts in (glob.split(".") for glob in globs) for i in range(len(parts))]
    names = [*sorted(HEAD_NAMES), *dict.fromkeys(tail for tail in tails if tail.strip("*"))]
    return [name for name in names if "*" not in name] + [rf"(.*\.)?{_expression(name)}" for name in names]


def _expression(glob: str) -> str:
    return re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")
