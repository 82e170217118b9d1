"""Low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_memsave._match import Patterns
from lightning_memsave.callbacks._adapter_precision import keep_adapter_dtype
from lightning_memsave.callbacks._frozen_checks import check_optimizers
from lightning_memsave.callbacks._weight_options import adapter_problems, adapter_settings, choice_problems
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._pass import Applied, Stage
from lightning_memsave.transforms.adapters import VARIANTS, add_adapters

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["LoRA"]


class LoRA(ModelTransform):
    """Train low-rank adapters and freeze everything else.

    ``"auto"`` adapts every linear layer but output heads, tied layers and layers a transformers model keeps in fp32.
    A head that is new (a classifier on a pretrained encoder) must be named in ``train``: whether a weight was loaded or
    drawn cannot be seen. Adapters stay fp32 under ``precision="bf16-true"``. Checkpoints hold what trains
    (``AdapterCheckpoint`` is attached).

    **Saves** gradients and optimizer state of every frozen weight, 12 bytes a parameter under AdamW; the bf16 copy that
    autocast keeps of every frozen fp32 matrix, ``2 * in * out`` bytes; peft's fp32 copy of every adapter input (not of
    ``dora``), ``4 * batch * tokens * in`` bytes under bf16. ``frozen_dtype="bf16"`` halves frozen fp32 matrices too.
    **Costs** ``rank * (in + out)`` trained values for each layer and two thin products; under autocast one more cast of
    each frozen fp32 matrix, in backward.
    **Numerics** are those of the low-rank model, bitwise peft's; ``frozen_dtype`` rounds frozen weights once.
    **Does not combine with** ``QLoRA`` (which contains it) and FSDP1 (which keeps gradients for frozen weights).

    Args:
        rank: Rank of the change of each weight.
        alpha: The change is scaled by ``alpha / rank``; ``None`` means ``2 * rank``.
        dropout: Probability of dropping an input of an adapter.
        modules: ``"auto"``, or globs over module names and class names. A container means the linear layers in it;
            ``nn.Embedding``, ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` must be named.
        variant: ``lora``, ``rslora`` (scaled by ``alpha / sqrt(rank)``) or ``dora`` (also trains each row's magnitude).
        train: Globs and class names of modules that stay trainable as they are, e.g. a new head.
        frozen_dtype: ``bf16`` or ``fp16`` to store frozen linear and embedding weights in; ``None`` leaves them. Layers
            cast as they compute; code that reads such a weight itself (``F.linear(x, embedding.weight)``) must cast.
        adapter_dtype: ``fp32`` or ``bf16`` to store the adapters in.

    Raises:
        ConfigurationError: At construction, for a wrong value; at ``fit``, if the model has adapters already, or its
            weights are sharded or on meta.
        NothingToTransformError: At ``fit``, if nothing matched.
        MissingDependencyError: At ``fit``, without peft.

    Example:
        >>> from torch import nn
        >>> from lightning_memsave import LoRA, apply
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> applied = apply(model, [LoRA(rank=8)])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A.default.weight', '0.lora_B.default.weight']

    Source:
        Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, https://arxiv.org/abs/2312.03732;
        Liu et al. 2024, https://arxiv.org/abs/2402.09353; through https://github.com/huggingface/peft.

    """

    stage = Stage.ADAPT

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        modules: Patterns = "auto",
        *,
        variant: Literal["lora", "rslora", "dora"] = "lora",
        train: Patterns = (),
        frozen_dtype: Literal["bf16", "fp16"] | None = None,
        adapter_dtype: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        super().__init__()
        problems = adapter_problems(rank, alpha, dropout, modules, train, frozen_dtype)
        problems += choice_problems("variant", variant, VARIANTS)
        problems += choice_problems("adapter_dtype", adapter_dtype, ("fp32", "bf16"))
        raise_problems(type(self).__name__, problems)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.modules = modules
        self.variant = variant
        self.train = train
        self.frozen_dtype = frozen_dtype
        self.adapter_dtype = adapter_dtype

    def apply(self, module: nn.Module) -> Applied:
        """Add the adapters in place."""
        return add_adapters(
            module,
            adapter_settings(type(self).__name__, self, variant=self.variant, adapter_dtype=self.adapter_dtype),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the adapters on the run's pass, keep their dtype, and checkpoint what trains."""
        from lightning_memsave.callbacks._checkpoint import attach_adapter_checkpoint

        super().setup(trainer, pl_module, stage)
        keep_adapter_dtype(trainer)
        check_optimizers(trainer, pl_module, stage, type(self).__name__)
        attach_adapter_checkpoint(trainer, pl_module, type(self).__name__)
