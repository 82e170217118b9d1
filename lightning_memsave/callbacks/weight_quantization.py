"""Quantized frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_memsave._match import Patterns
from lightning_memsave.callbacks._frozen_checks import check_optimizers, need_trainable
from lightning_memsave.callbacks._weight_options import (
    choice_problems,
    kind_problems,
    pattern_problems,
    quantization_settings,
)
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._pass import Applied, Stage
from lightning_memsave.transforms.quantization import Quantization, quantize_weights
from lightning_memsave.transforms.quantize_on_load import quantization_config

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["WeightQuantization"]


class WeightQuantization(ModelTransform):
    """Store frozen linear weights in 4 or 8 bits.

    ``"auto"`` takes every linear layer with at least 4,096 values, except output heads (vocabulary, classes), layers
    that share their weight, layers a transformers model keeps in fp32 and, in a module where some linear layers are
    frozen already, those that still train. What is quantized is frozen; add ``LoRA`` to train adapters on it, or use
    ``QLoRA``. Layers that transformers quantized while loading are kept. To never hold the full-precision model in host
    memory, give ``from_pretrained`` the ``quantization_config`` that ``loading_config()`` returns.

    **Saves** of ``N`` values in a weight of ``out`` rows, against ``N * itemsize`` bytes: 4-bit kinds hold
    ``ceil(N / 2) + ceil(N / 64) + 4 * ceil(N / 16384) + 68`` bytes (``ceil(N / 2) + 4 * ceil(N / 64) + 64`` without
    ``double_quant``), ``int8`` holds ``N + 4 * out``. One table of 1 KiB is shared. At most one more unquantized weight
    is held while it runs.
    **Costs** dequantizing each weight in forward and once more in backward, where one is held in the compute dtype.
    **Numerics** are bounded: nf4 moves a value by at most 0.153 of the largest of its 64 neighbours and fp4 by 0.167
    (``double_quant`` rounds that largest one as well), int8 by 1/225 of the largest of its row. Inputs are not rounded.
    **Does not combine with** ``QLoRA`` (which contains it), FSDP1 (needs one dtype) and DeepSpeed.

    Args:
        kind: ``nf4``, ``fp4`` or ``int8``.
        modules: ``"auto"``, or globs over module names and class names; a container means the linear layers in it.
        skip: Globs and class names of modules to leave out, with everything below them.
        double_quant: Quantize the scales of the 4-bit kinds too.
        compute_dtype: ``fp32``, ``bf16`` or ``fp16`` to multiply in; ``None`` follows the Trainer's precision.

    Raises:
        ConfigurationError: At construction, for an unknown kind or dtype; at ``fit``, if nothing is left to train, or
            weights are sharded, on meta, tied, trained or quantized otherwise.
        NothingToTransformError: At ``fit``, if nothing matched.
        MissingDependencyError: At ``fit``, without bitsandbytes.

    Example:
        >>> from torch import nn
        >>> from lightning_memsave import WeightQuantization, apply
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> for entry, done in apply(model, [WeightQuantization("nf4")]):
        ...     print(done.num_modules, done.bytes_before, done.bytes_after)
        2 32768 4368

    Source:
        Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; Dettmers et al. 2022, https://arxiv.org/abs/2208.07339.

    """

    stage = Stage.QUANTIZE

    def __init__(
        self,
        kind: Literal["nf4", "fp4", "int8"] = "nf4",
        modules: Patterns = "auto",
        *,
        skip: Patterns = (),
        double_quant: bool = True,
        compute_dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    ) -> None:
        super().__init__()
        problems = (
            kind_problems(kind) + pattern_problems("modules", modules, auto=True) + pattern_problems("skip", skip)
        )
        problems += choice_problems("compute_dtype", compute_dtype, ("fp32", "bf16", "fp16", None))
        raise_problems(type(self).__name__, problems)
        self.kind = kind
        self.modules = modules
        self.skip = skip
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype

    def apply(self, module: nn.Module) -> Applied:
        """Quantize in place."""
        return quantize_weights(module, self._settings())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the quantization on the run's pass; refuse a fit with nothing to train; checkpoint what trains."""
        from lightning_memsave.callbacks._checkpoint import attach_adapter_checkpoint

        super().setup(trainer, pl_module, stage)
        check_optimizers(trainer, pl_module, stage, type(self).__name__)
        need_trainable(trainer, pl_module, stage, type(self).__name__)
        attach_adapter_checkpoint(trainer, pl_module, type(self).__name__)

    def loading_config(self) -> Any:
        """Return what to pass as ``from_pretrained(..., quantization_config=...)`` to quantize while loading."""
        return quantization_config(self._settings())

    def _settings(self) -> Quantization:
        return quantization_settings(
            type(self).__name__,
            self.kind,
            modules=self.modules,
            skip=self.skip,
            double_quant=self.double_quant,
            compute_dtype=self.compute_dtype,
        )
