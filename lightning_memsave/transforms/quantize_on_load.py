"""Quantize while transformers loads, so that host memory never holds the full-precision model."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memsave._imports import require
from lightning_memsave.transforms.quantization import Quantization

__all__ = ["quantization_config"]


def quantization_config(settings: Quantization) -> Any:
    """Return the ``BitsAndBytesConfig`` that makes ``from_pretrained`` quantize each weight as it is read.

    Peak host memory is the quantized model plus what is read at a time (one weight of a safetensors file), instead of
    the whole model in its stored dtype.

    Args:
        settings: What and how. Of ``skip`` and ``train``, transformers understands plain module names.

    Raises:
        MissingDependencyError: Without transformers, bitsandbytes or accelerate.

    """
    transformers = require("transformers", f"{settings.subject}.loading_config()")
    require("bitsandbytes", f"{settings.subject}.loading_config()")
    require("accelerate", f"{settings.subject}.loading_config()")
    skipped = [pattern.strip("*.") for pattern in (*settings.skip, *settings.train)] or None
    if settings.kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.kind,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=settings.compute_dtype or torch.float32,
        llm_int8_skip_modules=skipped,
    )
