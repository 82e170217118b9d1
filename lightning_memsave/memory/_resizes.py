"""See storages that are resized in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["resizes_seen_by"]

_listeners: list[Callable[[torch.UntypedStorage], None]] = []


@contextmanager
def resizes_seen_by(listener: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Tell ``listener`` about every storage that is resized inside of the block.

    FSDP frees unsharded parameters through ``UntypedStorage.resize_``, which no dispatch mode sees. There is no
    instance to hook, so the class is, for as long as somebody listens.
    """
    cls: Any = torch.UntypedStorage
    if not _listeners:
        original = cls.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            for listen in _listeners:
                listen(storage)
            return result

        cls.resize_ = resize_
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
        if not _listeners:
            del cls.resize_  # the method of the base class shows again
