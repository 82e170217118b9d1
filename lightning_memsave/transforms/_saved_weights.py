"""Weights among what autograd saves: saved-tensor hooks are given them too."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["SavedWeights"]

_SHAPES_ONLY = ("Alias", "Expand", "Permute", "Squeeze", "T", "ToCopy", "Transpose", "Unsqueeze", "View")


class SavedWeights:
    """Recognizes the weights of a block among what it saves: they stay where they are."""

    def __init__(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        self._storages = {t.untyped_storage()._cdata for t in tensors if type(t).__name__ != "DTensor"}
        # weights cast by autocast or by the layer: another storage of the same shape
        self._frozen = {
            frozenset(t.shape) for t in tensors if t.ndim > 1 and not t.requires_grad and t.is_floating_point()
        }

    def hold(self, tensor: Tensor) -> bool:
        """Return whether a saved tensor is a weight, a view of one or a cast of one."""
        if tensor.untyped_storage()._cdata in self._storages:
            return True
        if tensor.grad_fn is None:
            return not tensor.requires_grad and tensor.ndim > 1 and frozenset(tensor.shape) in self._frozen
        node = tensor.grad_fn
        while node.name().startswith(_SHAPES_ONLY) and node.next_functions and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        variable = getattr(node, "variable", None)
        return isinstance(variable, nn.Parameter)
