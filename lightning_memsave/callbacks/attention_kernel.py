"""``AttentionKernel``: the attention kernel that keeps the least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import ConfigurationError, NothingToTransformError, raise_problems
from lightning_memsave.transforms._pass import Applied, Stage, Transform
from lightning_memsave.transforms.attention import IMPLEMENTATIONS, AttentionRun, check_device, set_attention

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["AttentionKernel"]

_KEY = "attention"


class AttentionKernel(ModelTransform):
    """Run attention by a kernel that keeps no scores, and say what prevents it.

    Hugging Face models get their attention implementation set, in every part of a composite model. Calls of
    ``torch.nn.functional.scaled_dot_product_attention`` and ``nn.MultiheadAttention`` are looked at during steps and
    backwards, and what silently forces a slow kernel is taken away where the result is the same: masks that hide
    nothing, masks that equal ``is_causal=True``, key and value heads repeated for grouped queries, a missing dimension
    of heads. ``q``, ``k`` and ``v`` of different dtypes, which torch refuses, run in the narrowest of them; fp32 calls
    stay fp32. After the first step one line for each kernel and reason says which layers it runs.

    **Saves** ``batch * heads * tokens * tokens * itemsize`` bytes a layer where scores were kept; with repeated heads
    also ``2 * batch * (heads - key_heads) * tokens * head_dim * itemsize``.
    **Costs** one pass over each mask a step (two synchronisations on an accelerator), and about a microsecond for each
    torch function that is called from Python.
    **Numerics** are those of the kernel: another order of summation, exact masks.
    **Does not combine with** attention written as ``softmax(q @ k) @ v``, which no callback can see, and Hugging Face
    models called with ``output_attentions=True``, which need their eager attention. Regions compiled by
    ``torch.compile`` are left as they are.

    Args:
        implementation: ``"auto"`` lets torch take the best kernel for each call, and moves eager Hugging Face models
            to SDPA where they allow it; it never changes to the flash-attn package, which reads padding and packed
            positions in its own way. ``"flash_attention"`` is that package (4, 3 or 2) in Hugging Face models; where
            it cannot run, SDPA does, flash first, and one line says so. ``"sdpa_flash"``, ``"sdpa_efficient"``,
            ``"sdpa_cudnn"`` and ``"flex"`` (Hugging Face models only) take one kernel and raise where it cannot run.
            ``"math"`` runs everywhere, changes no call and keeps the scores: to compare with.

    Raises:
        ConfigurationError: At construction, for an unknown name; at ``fit`` or at the first call, if a kernel asked for
            by name cannot run; the message names the layer and the reason.
        NothingToTransformError: After the first training step, if it called no attention.

    Example:
        >>> from lightning_memsave import AttentionKernel
        >>> AttentionKernel("sdpa_flash")
        AttentionKernel(implementation='sdpa_flash')

    Source:
        Dao 2023 (FlashAttention-2), https://arxiv.org/abs/2307.08691.

    """

    stage = Stage.KERNEL

    def __init__(
        self,
        implementation: Literal[
            "auto", "flash_attention", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flex", "math"
        ] = "auto",
    ) -> None:
        self.implementation = implementation
        known = ", ".join(map(repr, IMPLEMENTATIONS))
        problems = [f"implementation={implementation!r} is not one of {known}."] * (
            implementation not in IMPLEMENTATIONS
        )
        raise_problems(type(self).__name__, problems)

    def apply(self, module: nn.Module) -> Applied:
        """Set the attention of Hugging Face models, in place; other calls are looked at in a Trainer's steps only."""
        name = type(self).__name__
        if self.implementation not in ("auto", "flash_attention", "flex"):
            raise ConfigurationError(
                f"{name}: implementation={self.implementation!r} is a setting of the steps, and without a Trainer "
                "there are none. Pass it to Trainer(callbacks=...), or run your step in "
                "torch.nn.attention.sdpa_kernel(...), backward included."
            )
        first = next(module.parameters(), None)
        device = "cpu" if first is None else first.device.type
        applied, change = set_attention(
            module, self.implementation, device_type=device, half=first is not None and first.itemsize == 2
        )
        if not change.found:
            raise NothingToTransformError(
                f"{name}: found no Hugging Face model, and calls of scaled_dot_product_attention are looked at in a "
                "Trainer's steps. Pass it to Trainer(callbacks=...)."
            )
        return applied

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the transform on the run's pass; the steps are entered after every other context."""
        Saver.setup(self, trainer, pl_module, stage)
        session = Session.of(trainer)
        device = trainer.strategy.root_device.type
        check_device(self.implementation, device)

        def install(module: nn.Module) -> Applied:
            half = "mixed" in str(trainer.precision) or str(trainer.precision).endswith("16-true")
            half = half or next((p.itemsize == 2 for p in module.parameters()), False)
            applied, change = set_attention(module, self.implementation, device_type=device, half=half)
            run = session.shared(_KEY, lambda: AttentionRun(module, self.implementation, change))
            session.add_context(type(self).__name__, run.context)
            return applied

        session.add_transform(
            Transform(name=type(self).__name__, stage=self.stage, function=install, config=self.describe())
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once which kernel ran which layers."""
        if not outputs and pl_module.automatic_optimization:
            return  # the step was skipped
        session = Session.of(trainer)
        run = session.find_shared(_KEY)
        if isinstance(run, AttentionRun):
            for line in run.new_lines():
                session.report(type(self).__name__, line)
