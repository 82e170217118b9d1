"""Let mkdocstrings show the docstrings of this package as they are meant."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LABELS = re.compile(r"\n(?=\*\*(?:Costs|Numerics|Does not combine with)\*\*)")


class ReadableDocstrings(griffe.Extension):
    """Give each of Saves, Costs, Numerics ... its paragraph, and code to what stands under ``Example:``."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _LABELS.sub("\n\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
