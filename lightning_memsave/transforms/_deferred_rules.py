"""Which functions of deferred logits are kept for later, which run in chunks, and which ask for no values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memsave.transforms import _deferred_results as results
from lightning_memsave.transforms import _deferred_views as views
from lightning_memsave.transforms.deferred_logits import DeferredLogits

__all__ = ["PLAIN", "RULES"]

T = Tensor
RULES: dict[Any, Callable[..., Any]] = {
    T.__getitem__: views.getitem,
    T.__iter__: views.iterate,
    F.cross_entropy: results.cross_entropy,
    F.nll_loss: results.nll_loss,
    F.log_softmax: views.log_softmax,
    T.reshape: views.view,
    T.view: views.view,
    torch.reshape: views.view,
    T.view_as: lambda x, other: (
        views.view_as_shape(x, *other.shape) if isinstance(x, DeferredLogits) else NotImplemented
    ),
    T.reshape_as: lambda x, other: (
        views.view_as_shape(x, *other.shape) if isinstance(x, DeferredLogits) else NotImplemented
    ),
    T.contiguous: lambda x, **keywords: NotImplemented if keywords else x,
    T.float: partial(views.cast, torch.float32),
    T.half: partial(views.cast, torch.float16),
    T.bfloat16: partial(views.cast, torch.bfloat16),
    T.to: views.to,
    T.type_as: views.type_as,
    T.cpu: partial(views.on_device, "cpu"),
    T.cuda: partial(views.on_device, "cuda"),
    T.__mul__: partial(views.scaled, False),
    T.__rmul__: partial(views.scaled, False),
    T.__truediv__: partial(views.scaled, True),
    T.__add__: views.shifted,
    T.__radd__: views.shifted,
}
for _names, _rule in (
    (("flatten",), views.flatten),
    (("permute",), views.permute),
    (("transpose", "swapaxes", "swapdims"), views.transpose),
    (("movedim", "moveaxis"), views.movedim),
    (("squeeze",), views.squeeze),
    (("unsqueeze",), views.unsqueeze),
    (("split",), views.split),
    (("chunk",), views.chunk),
    (("unbind",), views.unbind),
    (("narrow",), views.narrow),
    (("index_select",), views.index_select),
    (("mul", "multiply"), partial(views.scaled, False)),
    (("div", "divide", "true_divide"), partial(views.scaled, True)),
    (("tanh",), views.tanh),
    (("add",), views.shifted),
    (("log_softmax",), views.log_softmax),
    (("detach",), views.detach),
    (("argmax",), results.argmax),
    (("max",), results.maximum),
    (("topk",), results.topk),
    (("logsumexp",), results.logsumexp),
    (("gather",), results.gather),
):
    for _name in _names:
        for _place in (torch, T):
            if hasattr(_place, _name):
                RULES[getattr(_place, _name)] = _rule

_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_xpu",
    "is_mps", "layout", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes",
    "names", "output_nr", "_version", "_base", "grad", "_backward_hooks",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex", "element_size",
    "get_device", "stride", "storage_offset", "is_contiguous", "is_inference", "is_signed", "is_conj", "is_neg",
    "__hash__", "__repr__", "__format__", "_is_view",
)  # fmt: skip
# What only asks for metadata, and never for values.
PLAIN: set[Any] = {getattr(T, name).__get__ for name in _PROPERTIES if hasattr(T, name)}
PLAIN |= {getattr(place, name) for name in _METHODS for place in (T, torch) if hasattr(place, name)}
