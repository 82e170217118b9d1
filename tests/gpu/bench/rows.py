"""What the GPU suite measures: every row is data, and a new feature adds a row.

A row is one training run in a fresh process. Two rows that differ only in ``framework`` are the same run, once with
this package and once with what people use instead: HF Trainer, peft and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ROWS", "SHAPES", "ImageShape", "Row", "Saver", "Shape", "row"]

NUM_STEPS = 8  # the median step time leaves out the first two, which allocate and warm up


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama model; weights are drawn at random, so no download is needed.

    Args:
        hidden: Width of the residual stream.
        intermediate: Width inside the MLP.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocabulary: Rows of the embedding.
        tied: Whether the head is the embedding.

    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """The sizes of a vision transformer; a row's ``tokens`` are its patches and the class token.

    Args:
        hidden: Width of the residual stream.
        intermediate: Width inside the MLP.
        layers: Encoder layers.
        heads: Attention heads.
        image: Side of the square image in pixels.
        patch: Side of a patch in pixels.

    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image: int
    patch: int

    @property
    def tokens(self) -> int:
        """Tokens an image."""
        return (self.image // self.patch) ** 2 + 1


SHAPES: dict[str, Shape | ImageShape] = {
    "tiny-vit": ImageShape(hidden=64, intermediate=128, layers=2, heads=4, image=28, patch=14),
    "vit-g-1.1b": ImageShape(hidden=1408, intermediate=6144, layers=40, heads=16, image=224, patch=14),
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=512, tied=True),
    "llama-3.2-3b": Shape(
        hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, vocabulary=128256, tied=True
    ),
    "llama-3.1-8b": Shape(
        hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256, tied=False
    ),
}

Saver = tuple[str, Mapping[str, Any]]  # public class of this package, its arguments
SPLIT: Saver = ("BF16Precision", {"weights": "split"})
# 5 bytes a parameter: the gradient is gone as soon as it is used, the logits are never whole
RELEASED: tuple[Saver, ...] = (
    ("ActivationCheckpointing", {}),
    ("LowMemoryOptimizer", {"name": "adamw_split_master"}),
    ("GradientRelease", {"clip": "two_pass"}),
    ("ChunkedLoss", {}),
    ("AllocatorSettings", {}),
)
RELEASED_ONCE = tuple(("GradientRelease", {}) if name == "GradientRelease" else (name, a) for name, a in RELEASED)
OFFLOADED: tuple[Saver, ...] = (
    ("ActivationCheckpointing", {}),
    ("OptimizerOffload", {"gradients": True}),
    ("ChunkedLoss", {}),
    ("AllocatorSettings", {}),
)
FULL: tuple[Saver, ...] = (
    ("ActivationCheckpointing", {}),
    ("LowMemoryOptimizer", {"name": "adamw_8bit"}),
    ("EarlyZeroGrad", {}),
    ("AllocatorSettings", {}),
)
QLORA: tuple[Saver, ...] = (
    ("QLoRA", {"rank": 16}),
    ("ActivationCheckpointing", {}),
    ("LowMemoryOptimizer", {"name": "adamw_8bit"}),
    ("EarlyZeroGrad", {}),
    ("AllocatorSettings", {}),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run to measure.

    Args:
        shape: A key of ``SHAPES``.
        method: ``full`` trains every weight with 8-bit AdamW; ``qlora`` trains rank-16 adapters on a 4-bit model.
        framework: ``memsave`` (Lightning with our callbacks) or ``huggingface`` (Trainer, peft, bitsandbytes).
        batch: Sequences a step.
        tokens: Tokens a sequence.
        savers: Our callbacks, for ``memsave`` rows.
        precision: Lightning's ``precision``, for ``memsave`` rows.
        plugin: Our precision plugin, for ``memsave`` rows; it takes the place of ``precision``.
        clip: Norm to which the gradient is clipped; ``None`` for no clipping.
        learning_rate: Of AdamW.
        warmup: Whether a scheduler warms the learning rate up over two steps, for ``memsave`` rows.
        estimate_seconds: What the whole process takes; the suite does not start it with less time left.
        variant: Tells apart rows that are equal in everything above, e.g. another saver.
        revision: Raise it when the row's meaning changes, so that it is measured again beside the old result.

    """

    shape: str
    method: Literal["full", "qlora"]
    framework: Literal["memsave", "huggingface"]
    batch: int
    tokens: int
    savers: tuple[Saver, ...] = ()
    precision: str = "bf16-true"
    plugin: Saver | None = None
    clip: float | None = 1.0
    learning_rate: float = 1e-5
    warmup: bool = False
    estimate_seconds: int = 120
    variant: str = ""
    revision: int = 1
    steps: int = field(default=NUM_STEPS, repr=False)

    @property
    def name(self) -> str:
        """The row's name, e.g. ``llama-3.2-3b/full/2x4096/memsave``."""
        parts = (self.shape, self.method, f"{self.batch}x{self.tokens}", self.framework, self.variant)
        return "/".join(part for part in parts if part)

    @property
    def precision_text(self) -> str:
        """The Trainer's precision, or the plugin that takes its place."""
        if self.framework != "memsave":
            return "bf16"
        return self.plugin[0] if self.plugin else self.precision

    @property
    def savers_text(self) -> str:
        """The callbacks and the precision plugin as one would write them."""
        written = (*([self.plugin] if self.plugin else []), *self.savers)
        return ", ".join(f"{name}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for name, a in written)


def _pair(shape: str, method: Literal["full", "qlora"], batch: int, tokens: int, seconds: int) -> tuple[Row, Row]:
    """Return our row and the same run with HF Trainer, which writes and reloads the model before it quantizes."""
    savers, rate = (FULL, 1e-5) if method == "full" else (QLORA, 2e-4)
    ours = Row(
        shape=shape,
        method=method,
        framework="memsave",
        batch=batch,
        tokens=tokens,
        savers=savers,
        learning_rate=rate,
        estimate_seconds=seconds,
    )
    theirs = Row(
        shape=shape,
        method=method,
        framework="huggingface",
        batch=batch,
        tokens=tokens,
        learning_rate=rate,
        estimate_seconds=seconds if method == "full" else 2 * seconds,
    )
    return ours, theirs


def _more(
    shape: str, batch: int, tokens: int, seconds: int, variant: str, savers: tuple[Saver, ...], **changes: Any
) -> Row:
    """Return a row of full fine-tuning with more savers than HF Trainer has."""
    return Row(
        shape=shape,
        method="full",
        framework="memsave",
        batch=batch,
        tokens=tokens,
        savers=savers,
        estimate_seconds=seconds,
        variant=variant,
        warmup=True,
        **changes,
    )


VIT_TOKENS = 257

ROWS: tuple[Row, ...] = (
    *_pair("tiny", "full", 2, 32, 30),
    *_pair("tiny", "qlora", 2, 32, 30),
    *_pair("llama-3.2-3b", "full", 2, 4096, 90),
    *_pair("llama-3.2-3b", "qlora", 2, 4096, 90),
    *_pair("llama-3.1-8b", "qlora", 2, 512, 120),
    *_pair("llama-3.1-8b", "qlora", 2, 2048, 120),
    _more("tiny", 2, 32, 30, "split-released", RELEASED, plugin=SPLIT),
    _more("tiny", 2, 32, 30, "offloaded", OFFLOADED),
    _more("tiny-vit", 2, 5, 30, "offloaded", OFFLOADED[:2]),
    _more("llama-3.2-3b", 2, 4096, 150, "split-released", RELEASED, plugin=SPLIT),
    _more("llama-3.2-3b", 2, 4096, 120, "split-released-unclipped", RELEASED_ONCE, plugin=SPLIT, clip=None),
    _more("llama-3.2-3b", 2, 4096, 180, "offloaded", OFFLOADED),
    _more("llama-3.1-8b", 2, 2048, 300, "offloaded", OFFLOADED),
    _more("vit-g-1.1b", 32, VIT_TOKENS, 120, "offloaded", OFFLOADED[:2] + OFFLOADED[-1:]),
)


def row(name: str) -> Row:
    """Return the row of that name.

    Raises:
        KeyError: If there is none; the message lists all names.

    """
    for candidate in ROWS:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no row {name!r}; there are {', '.join(r.name for r in ROWS)}")
