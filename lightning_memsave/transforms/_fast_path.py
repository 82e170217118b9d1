"""Switch off torch's fused inference path of ``nn.TransformerEncoderLayer`` where it would read changed weights.

In eval mode without gradients that path multiplies with ``linear1.weight`` itself and never calls ``linear1``: adapters
would be left out of every validation, silently, and narrow or packed weights would fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lightning_memsave.transforms._selection import under

__all__ = ["disable_fast_paths"]


def disable_fast_paths(root: nn.Module, changed: Sequence[str]) -> Callable[[], None]:
    """Make encoder layers that hold one of the ``changed`` modules call their sublayers; on instances, in place.

    Returns:
        A function that puts the fast path back.

    """
    olds: list[tuple[nn.Module, str, object]] = []
    attributes = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for name, module in root.named_modules():
        attribute = next((a for cls, a in attributes.items() if isinstance(module, cls)), None)
        if attribute is None or not any(not name or under(c, [name]) for c in changed):
            continue
        olds.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, 0)

    def undo() -> None:
        for module, attribute, old in olds:
            setattr(module, attribute, old)

    return undo
