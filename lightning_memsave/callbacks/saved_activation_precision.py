"""``SavedActivationPrecision``: what is saved for backward in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_memsave._match import Patterns, as_patterns
from lightning_memsave.callbacks._session import Session
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._pass import Applied, Stage
from lightning_memsave.transforms.saved_precision import DTYPES, compress_blocks, saved_counts
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SavedActivationPrecision"]


class SavedActivationPrecision(ModelTransform):
    """Keep what blocks save for backward in 8 bits, and masks in one.

    The forward is untouched; the backward computes gradients from rounded activations. Cheaper than recomputing, and
    less saved: a choice between keeping everything and ``ActivationCheckpointing``.

    **Saves** ``itemsize - 1 - 4 / 256`` bytes of each saved value (fp32: 74 %, bf16: 49 %), and 7/8 of a bool mask.
    ``nn.ReLU`` and ``nn.Dropout`` modules keep one bit a value, exactly.
    **Costs** the rounding in forward and back in backward, both element by element, and an fp32 copy of one tensor
    meanwhile.
    **Numerics** are bounded: ``int8`` is off by at most 1/252 of the largest of 256 neighbouring values, ``fp8`` by
    1/16 of the value itself (and 2^-10 / 448 of the largest). Losses of a step are exact, gradients are not.
    **Does not combine with** ``ActivationCheckpointing`` or ``ActivationOffloading`` over the same blocks: what they
    keep is little, and its rounding would reach the forward that is repeated. Tensors that are no plain memory, have
    fewer than ``min_values`` values or one feature (statistics) are kept as they are.

    Args:
        modules: ``"auto"`` finds the repeated blocks. Else one glob over qualified module names, a class name, or a
            list of them; of nested matches the outermost is taken.
        dtype: ``"int8"`` or ``"fp8"`` (e4m3), with one fp32 scale for 256 values.
        min_values: Smaller tensors are kept as they are.

    Raises:
        ConfigurationError: At construction, for a wrong argument.
        NothingToTransformError: At ``fit``, if nothing repeats or a pattern matched nothing.

    Example:
        >>> from lightning_memsave import SavedActivationPrecision
        >>> SavedActivationPrecision(dtype="fp8")
        SavedActivationPrecision(dtype='fp8')

    Source:
        Chen et al. 2021 (ActNN), https://arxiv.org/abs/2104.14129; Liu et al. 2022 (GACT),
        https://arxiv.org/abs/2206.11357.

    """

    stage = Stage.CHECKPOINT + 5

    def __init__(
        self, modules: Patterns = "auto", dtype: Literal["int8", "fp8"] = "int8", *, min_values: int = 4096
    ) -> None:
        self.modules = modules
        self.dtype = dtype
        self.min_values = min_values
        as_patterns(modules, subject=type(self).__name__)
        problems = []
        if dtype not in DTYPES:
            problems.append(f'dtype={dtype!r} is not a form of saved activations. Write "int8" or "fp8".')
        if type(min_values) is not int or min_values < 1:
            problems.append(f"min_values={min_values!r} must be an int of 1 or more, e.g. 4096.")
        raise_problems(type(self).__name__, problems)

    def apply(self, module: nn.Module) -> Applied:
        """Narrow what the selected blocks save, in place."""
        patterns = as_patterns(self.modules, subject=type(self).__name__)
        return compress_blocks(module, patterns, dtype=self.dtype, min_values=self.min_values)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once what was narrowed."""
        if batch_idx > 0 or trainer.current_epoch > 0:
            return
        counts = saved_counts(pl_module)
        sizes = f"{format_bytes(counts.bytes_before)} -> {format_bytes(counts.bytes_after)}"
        line = f"{counts.tensors} saved tensors, {sizes}" if counts.tensors else "inactive: no large tensor was saved"
        Session.of(trainer).report(type(self).__name__, line, warning=not counts.tensors)
