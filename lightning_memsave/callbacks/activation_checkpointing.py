"""``ActivationCheckpointing``: recompute activations in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_memsave._match import Patterns, as_patterns
from lightning_memsave.callbacks._session import Session
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._pass import Applied, Stage
from lightning_memsave.transforms.checkpoint_blocks import (
    POLICIES,
    checkpoint_blocks,
    explain_recompute_errors,
    inactive_regularization,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ActivationCheckpointing"]


class ActivationCheckpointing(ModelTransform):
    """Recompute activations of repeated blocks in backward instead of keeping them.

    **Saves** everything a block keeps for its backward except the block's arguments: for a block that keeps
    ``saved`` bytes and is given ``(batch, tokens, hidden)``,
    ``saved - batch * tokens * hidden * itemsize`` bytes each. What several blocks are given (masks, positions) is kept
    once. ``"every_n"`` saves this for each chosen block; ``"selective"`` keeps the results of matrix products,
    convolutions and fused attention as well.
    **Costs** one more forward of the blocks per backward, at most: what follows the last value the backward needs is
    not repeated. ``"selective"`` repeats the cheap operations only.
    **Numerics** are bitwise equal: random numbers, autocast, hooks, batch-norm statistics and the state of stateful
    layers are replayed, and updated once. A key/value cache that a model would fill while it trains stays empty, as
    with ``use_cache=False``.
    **Does not combine with** a second ``ActivationCheckpointing`` over the same modules, a filled key/value cache, or
    ``torch.func`` transforms over the blocks.

    Blocks are recomputed in ``eval()`` mode too, which is how ``from_pretrained`` returns a model, and whenever
    gradients are enabled; under ``torch.no_grad()`` nothing changes. A model's own checkpointing is replaced while
    ``modules="auto"`` runs. Names, keys and classes of modules stay as they are.

    Args:
        modules: ``"auto"`` finds the repeated blocks (decoder layers, residual blocks, graph layers). Else one glob
            over qualified module names, a class name, or a list of them; of nested matches the outermost is taken.
        policy: ``full`` recomputes every selected block, ``every_n`` every n-th, ``selective`` every block but its
            matrix products and attention.
        every_n: With ``every_n``: the first block and every n-th after it, in each list of blocks.
        budget: Reserved for ``policy="budget"``, which does not exist yet.

    Raises:
        ConfigurationError: At construction, for a wrong argument; at ``fit``, if a block is selected twice or its
            forward cannot be repeated.
        NothingToTransformError: At ``fit``, if nothing repeats or a pattern matched nothing.

    Example:
        >>> from lightning_memsave import ActivationCheckpointing
        >>> ActivationCheckpointing("*.layers.*", policy="every_n", every_n=3)
        ActivationCheckpointing(modules='*.layers.*', policy='every_n', every_n=3)

    Source:
        Chen et al. 2016, https://arxiv.org/abs/1604.06174; ``torch.utils.checkpoint``; selective: Korthikanti et al.
        2022, https://arxiv.org/abs/2205.05198, section 5.

    """

    stage = Stage.CHECKPOINT
    repeatable = True

    def __init__(
        self,
        modules: Patterns = "auto",
        policy: Literal["full", "selective", "every_n", "budget"] = "full",
        *,
        every_n: int = 2,
        budget: int | str | None = None,
    ) -> None:
        self.modules = modules
        self.policy = policy
        self.every_n = every_n
        self.budget = budget
        as_patterns(modules, subject=type(self).__name__)
        allowed = ", ".join(f'"{name}"' for name in POLICIES)
        problems = []
        if policy == "budget" or budget is not None:
            problems.append(
                f"policy={policy!r}, budget={budget!r}: choosing blocks by a memory budget does not exist yet. "
                f"Use one of {allowed}, without budget."
            )
        elif policy not in POLICIES:
            problems.append(f"policy={policy!r} is not a policy. Use one of {allowed}.")
        if type(every_n) is not int or every_n < 2:
            problems.append(f'every_n={every_n!r} must be an int of 2 or more; policy="full" recomputes every block.')
        elif every_n != 2 and policy != "every_n":
            problems.append(f'every_n={every_n!r} has no effect with policy={policy!r}. Add policy="every_n".')
        raise_problems(type(self).__name__, problems)

    def apply(self, module: nn.Module) -> Applied:
        """Recompute the selected blocks, in place."""
        patterns = as_patterns(self.modules, subject=type(self).__name__)
        return checkpoint_blocks(module, patterns, policy=self.policy, every_n=self.every_n)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the transform on the run's pass, and name the block when a recompute fails."""
        super().setup(trainer, pl_module, stage)
        Session.of(trainer).add_context(type(self).__name__, lambda phase: explain_recompute_errors())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which recomputed blocks train without dropout or batch statistics, since they are in eval mode."""
        line = inactive_regularization(pl_module)
        if line:
            Session.of(trainer).report(type(self).__name__, line, warning=True)
