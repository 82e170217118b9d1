"""``AdapterCheckpoint``: checkpoints without the frozen base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_memsave.callbacks._checkpoint import attach_adapter_checkpoint, attach_filter
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.errors import ConfigurationError, NothingToTransformError, raise_problems
from lightning_memsave.transforms._adapter_config import adapter_configs

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["AdapterCheckpoint", "attach_adapter_checkpoint"]


class AdapterCheckpoint(Saver):
    """Keep the frozen weights out of checkpoints, and check what is loaded.

    ``LoRA`` and ``QLoRA`` attach it by themselves; add it for its option, or for any module with frozen parts. The
    stock ``ModelCheckpoint`` and ``ckpt_path=`` work unchanged, weights-only checkpoints too. A checkpoint holds the
    trainable parameters, every persistent buffer, frozen parameters that moved in training (a momentum teacher), the
    optimizer with its parameters' names, and a fingerprint of the frozen base; tensors and plain data only, so that
    ``torch.load(weights_only=True)`` reads it. Loading is strict in its own way: missing, unknown, renamed or reshaped
    keys and another base raise before a weight is touched. Use it with ``load_adapters`` outside a Trainer.

    **Saves** the bytes of the frozen parameters in every checkpoint, on disk and while it is written; no device memory.
    **Costs** one read of the frozen weights at the first save and at a load (0.2 s per 135M fp32 weights on one CPU
    core), and a read of at most 65,536 elements of each at every other save.
    **Numerics** are those of a whole checkpoint: a run resumed at the end of an epoch is bitwise equal.
    **Does not combine with** ``WeightAveraging``, ``FSDPStrategy`` (FSDP1) and DeepSpeed.

    Args:
        export_peft: Also write a folder ``<checkpoint name>-peft`` in PEFT's format beside every checkpoint
            (``adapter_model.safetensors`` and ``adapter_config.json``), for ``peft.PeftModel.from_pretrained``.

    Raises:
        ConfigurationError: At ``fit``, if adapters are to be exported and the module has none.
        NothingToTransformError: At ``fit``, if nothing is frozen.
        CheckpointMismatchError: When a checkpoint is loaded that is not of this module or not of this base.

    Example:
        >>> from lightning_memsave import AdapterCheckpoint
        >>> AdapterCheckpoint(export_peft=True)
        AdapterCheckpoint(export_peft=True)

    """

    def __init__(self, *, export_peft: bool = False) -> None:
        if export_peft not in (True, False):
            raise_problems("AdapterCheckpoint", [f"export_peft={export_peft!r} is no bool. Write True or False."])
        self.export_peft = export_peft

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook the strategy's reading and writing of checkpoints."""
        super().setup(trainer, pl_module, stage)
        attach_filter(trainer, export_peft=self.export_peft)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to do nothing, now that the module is as it will be trained."""
        if all(p.requires_grad for p in pl_module.parameters()):
            raise NothingToTransformError(
                f"AdapterCheckpoint: all parameters of {type(pl_module).__name__} are trainable, so a checkpoint holds "
                "them all anyway. Add LoRA or QLoRA, freeze a part (requires_grad_(False)), or leave AdapterCheckpoint "
                "out."
            )
        if self.export_peft and not adapter_configs(pl_module):
            raise ConfigurationError(
                f"AdapterCheckpoint(export_peft=True): {type(pl_module).__name__} has no adapters to export. Add LoRA "
                "or QLoRA, or leave export_peft out."
            )
