"""Low-rank adapters on quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_memsave._match import Patterns
from lightning_memsave.callbacks._adapter_precision import keep_adapter_dtype
from lightning_memsave.callbacks._frozen_checks import check_optimizers
from lightning_memsave.callbacks._weight_options import (
    adapter_problems,
    adapter_settings,
    kind_problems,
    quantization_settings,
)
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._pass import Applied, Stage, Transform
from lightning_memsave.transforms.adapters import add_adapters
from lightning_memsave.transforms.quantization import Quantization, quantize_weights
from lightning_memsave.transforms.quantize_on_load import quantization_config

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["QLoRA"]


class QLoRA(ModelTransform):
    """Train low-rank adapters on frozen weights stored in 4 or 8 bits.

    ``WeightQuantization(kind)`` on every linear layer but heads, then ``LoRA(rank, ...)`` on ``modules``; everything
    else is frozen. For other combinations (skipped layers, a compute dtype, DoRA) use those two callbacks together.
    Embeddings, norms and heads are not cast to fp32. A model that transformers quantized while loading is used as it
    is; see ``loading_config()``.

    **Saves** what ``WeightQuantization`` and ``LoRA`` save: of ``N`` fp32 values in a weight under AdamW, ``16 * N``
    bytes of weight, gradient and state become about ``0.516 * N``, plus ``16 * rank * (in + out)`` for the adapter.
    **Costs** dequantizing each weight in forward and once more in backward, and two thin products a layer.
    **Numerics** are those of the low-rank model on rounded weights; see ``WeightQuantization``.
    **Does not combine with** ``LoRA`` and ``WeightQuantization`` (it is both), FSDP1 and DeepSpeed.

    Args:
        rank: Rank of the change of each weight.
        alpha: The change is scaled by ``alpha / rank``; ``None`` means ``2 * rank``.
        dropout: Probability of dropping an input of an adapter.
        modules: Layers to adapt: ``"auto"``, or globs over module names and class names.
        kind: ``nf4``, ``fp4`` or ``int8``.
        train: Globs and class names of modules that are neither quantized nor frozen, e.g. a new head.
        frozen_dtype: ``bf16`` or ``fp16`` to store what is frozen and not quantized in; ``None`` leaves it.

    Raises:
        ConfigurationError: At construction, for a wrong value; at ``fit``, if the model has adapters already, is
            quantized otherwise, or its weights are sharded or on meta.
        NothingToTransformError: At ``fit``, if nothing matched.
        MissingDependencyError: At ``fit``, without bitsandbytes or peft.

    Example:
        >>> from torch import nn
        >>> from lightning_memsave import QLoRA, apply
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> applied = apply(model, [QLoRA(rank=4)])
        >>> model[0].base_layer.weight.dtype
        torch.uint8

    Source:
        Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.

    """

    stage = Stage.QUANTIZE

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        modules: Patterns = "auto",
        *,
        kind: Literal["nf4", "fp4", "int8"] = "nf4",
        train: Patterns = (),
        frozen_dtype: Literal["bf16", "fp16"] | None = None,
    ) -> None:
        super().__init__()
        problems = adapter_problems(rank, alpha, dropout, modules, train, frozen_dtype) + kind_problems(kind)
        raise_problems(type(self).__name__, problems)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.modules = modules
        self.kind = kind
        self.train = train
        self.frozen_dtype = frozen_dtype

    def transforms(self) -> Sequence[Transform]:
        """Return the quantization and the adapters, each at its stage."""
        name, config = type(self).__name__, self.describe()
        return [
            Transform(name=f"{name} weights", stage=Stage.QUANTIZE, function=self._quantize, config=config),
            Transform(name=f"{name} adapters", stage=Stage.ADAPT, function=self._adapt, config=config),
        ]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put both on the run's pass, keep the adapters' dtype, and checkpoint what trains."""
        from lightning_memsave.callbacks._checkpoint import attach_adapter_checkpoint

        super().setup(trainer, pl_module, stage)
        keep_adapter_dtype(trainer)
        check_optimizers(trainer, pl_module, stage, type(self).__name__)
        attach_adapter_checkpoint(trainer, pl_module, type(self).__name__)

    def loading_config(self) -> Any:
        """Return what to pass as ``from_pretrained(..., quantization_config=...)`` to quantize while loading."""
        return quantization_config(self._settings())

    def _settings(self) -> Quantization:
        return quantization_settings(type(self).__name__, self.kind, train=self.train)

    def _quantize(self, module: nn.Module) -> Applied:
        return quantize_weights(module, self._settings())

    def _adapt(self, module: nn.Module) -> Applied:
        return add_adapters(module, adapter_settings(type(self).__name__, self))
