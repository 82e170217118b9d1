"""The other ways to a chunked loss: PyTorch's own operator and Liger's CUDA kernels, and when they are right."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memsave._imports import is_available, require
from lightning_memsave.transforms._deferred_projection import Head, LinearHead, Products
from lightning_memsave.transforms._deferred_tasks import CrossEntropy, Scale, Steps, Tanh

__all__ = ["BACKENDS", "Backend", "choose_backend", "liger_loss", "missing_backend", "torch_loss"]

Backend = Literal["auto", "torch", "native", "liger"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "native", "liger")


def missing_backend(backend: str) -> str:
    """Return why a backend cannot run in this installation, or ``""``."""
    if backend == "torch" and not hasattr(F, "linear_cross_entropy"):
        return (
            f"backend='torch' needs torch.nn.functional.linear_cross_entropy, which torch {torch.__version__} does not "
            'have (2.13 does). Write backend="native".'
        )
    if backend == "liger" and not is_available("liger_kernel"):
        return (
            "backend='liger' needs liger_kernel, and it is not installed. Install it with "
            'pip install "lightning-memsave[liger]", or write backend="native".'
        )
    return ""


def choose_backend(
    backend: str, head: Head, task: CrossEntropy, steps: Steps, reduction: str, products: Products
) -> tuple[str, str]:
    """Return the backend that runs this loss, and why it is not the one that was asked for.

    ``auto`` is Liger on CUDA where it is installed and can compute this loss, and our own elsewhere: it is as fast as
    PyTorch's operator on the CPU or faster, takes every case, and its fp32 sums are right in 16-bit models.
    """
    if backend == "native":
        return backend, ""
    wanted = "liger" if backend == "auto" else backend
    if backend == "auto" and (products.device.type != "cuda" or not is_available("liger_kernel")):
        return "native", ""
    why = (
        _torch_cannot(head, task, steps, reduction, products.dtype)
        if wanted == "torch"
        else _liger_cannot(head, steps, reduction, products.device)
    )
    return (wanted, "") if not why else ("native", "" if backend == "auto" else why)


def _torch_cannot(head: Head, task: CrossEntropy, steps: Steps, reduction: str, dtype: torch.dtype) -> str:
    if not hasattr(F, "linear_cross_entropy"):
        return "this torch has no linear_cross_entropy"
    if not isinstance(head, LinearHead) or head.weight is None:
        return "the head is not a plain linear layer"
    if dtype not in (torch.float32, torch.float64):
        return "its mean and sum are wrong in 16 bits"
    if steps or task.smoothing or task.z_loss:
        return "it does not chunk scaled or soft-capped logits, label smoothing or z-loss"
    return "" if reduction != "none" else "its gradient of single rows is not made in chunks"


def _liger_cannot(head: Head, steps: Steps, reduction: str, device: torch.device) -> str:
    if device.type != "cuda":
        return "its kernels need CUDA"
    if not isinstance(head, LinearHead) or head.weight is None:
        return "the head is not a plain linear layer"
    if steps and _softcap(steps) is None:
        return "it does not scale or shift logits"
    return "" if reduction != "none" else "its gradient of single rows is wrong in some of its versions"


def _softcap(steps: Steps) -> float | None:
    """Return c if the steps are ``tanh(z / c) * c``."""
    if len(steps) != 3:
        return None
    first, squash, last = steps
    if not (isinstance(first, Scale) and isinstance(squash, Tanh) and isinstance(last, Scale)):
        return None
    if isinstance(first.factor, Tensor) or isinstance(last.factor, Tensor) or last.inverse:
        return None
    before = first.factor if first.inverse else 1.0 / first.factor
    return last.factor if before == last.factor else None


def torch_loss(
    head: LinearHead, task: CrossEntropy, hidden_rows: Tensor, reduction: str, chunk: int, dtype: torch.dtype
) -> Tensor:
    """Run ``F.linear_cross_entropy`` in chunks of our choice: its own are far too small on a CPU."""
    assert head.weight is not None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    loss: Tensor = F.linear_cross_entropy(
        hidden_rows.to(dtype),
        head.weight.to(dtype),
        task.target,
        linear_bias=None if head.bias is None else head.bias.to(dtype),
        weight=task.class_weight,
        reduction=reduction,
        options=options,
    )
    return loss


def liger_loss(
    head: LinearHead, task: CrossEntropy, hidden_rows: Tensor, steps: Steps, reduction: str, dtype: torch.dtype
) -> Tensor:
    """Run Liger's fused linear cross entropy."""
    functional = require("liger_kernel.transformers.functional", 'ChunkedLoss(backend="liger")')
    assert head.weight is not None
    loss: Tensor = functional.liger_fused_linear_cross_entropy(
        hidden_rows.to(dtype),
        head.weight.to(dtype),
        task.target,
        bias=None if head.bias is None else head.bias.to(dtype),
        ce_weight=task.class_weight,
        lse_square_scale=task.z_loss,
        label_smoothing=task.smoothing,
        reduction=reduction,
        softcap=_softcap(steps),
    )
    return loss
