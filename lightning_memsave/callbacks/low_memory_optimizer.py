"""Replace the optimizer of any module by one with small state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_memsave.callbacks._precision_checks import check_precision
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.optim.registry import OPTIMIZERS, name_problems, option_problems
from lightning_memsave.optim.swap import Swapped, keep_32bit_problems, swap_optimizers
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["LowMemoryOptimizer"]


class LowMemoryOptimizer(Saver):
    """Replace what configure_optimizers returns by an optimizer with small state.

    Parameter groups, their learning rates and own keys, schedulers (nested ones too), several optimizers and manual
    optimization stay as the module wrote them.

    **Saves** per trained value, against the 8 bytes of AdamW: ``adamw_8bit``, ``paged_adamw_8bit`` and ``adamw_fp8``
    hold ``2 + 8 / 256`` bytes, ``adamw_4bit`` ``1 + 8 / 128``, ``lion_8bit`` ``1 + 4 / 256``, ``lion``, ``adam_mini``,
    ``came`` and ``muon`` 4, ``adafactor`` and ``adalomo`` about 0 (one row and one column a matrix), ``galore_adamw``
    and ``apollo_adamw`` two thin matrices of ``rank`` columns, ``paged_adamw_32bit`` 8 that move to the host when the
    accelerator is full. One row each with its formula: the how-to page "Shrink the optimizer".
    **Costs** the conversion of the state, or the products of the rule, in every step. Large tensors are stepped in
    blocks, without fp32 copies of the largest one (Muon makes three of a matrix; bitsandbytes four on a CPU, left
    out by slices, in half the time).
    **Numerics** are statistical: AdamW in 8 bits, fp8 and 4 bits follows AdamW, the others are other update rules. The
    state of embeddings and norms, and of tensors below 4096 values, stays fp32 in the narrow ones.
    **Does not combine with** sharded (DTensor) parameters, for the names that step on whole tensors: all but those of
    bitsandbytes, which step on the shards. LBFGS, schedule-free and Prodigy-like optimizers are refused.

    Args:
        name: ``adamw_8bit``, ``paged_adamw_8bit``, ``paged_adamw_32bit``, ``lion_8bit``, ``lion``,
            ``adamw_split_master``, ``adafactor``, ``adalomo``, ``adamw_4bit``, ``adamw_fp8``, ``came``, ``adam_mini``,
            ``muon``, ``galore_adamw`` or ``apollo_adamw``.
        options: Hyper-parameters for every group, e.g. ``{"betas": (0.9, 0.95)}``; they win over those of the replaced
            optimizer. The learning rates stay those of ``configure_optimizers``.
        keep_32bit: Modules whose state stays that of 32-bit AdamW: ``"auto"`` (embeddings and norms, and the heads for
            ``muon``, ``galore_adamw`` and ``apollo_adamw``), globs or class names, or an empty list for none.

    Raises:
        ConfigurationError: At construction, for an unknown name or option; at ``fit``, if the module's optimizer
            cannot be replaced without changing what it does.
        MissingDependencyError: At ``fit``, if bitsandbytes is needed and not installed.
        NothingToTransformError: At ``fit``, if a pattern of ``keep_32bit`` matches no module.
        CheckpointMismatchError: At ``fit``, if the checkpoint to resume holds another optimizer's state.

    Example:
        >>> from lightning_memsave import LowMemoryOptimizer
        >>> LowMemoryOptimizer("adamw_8bit", options={"betas": (0.9, 0.95)})
        LowMemoryOptimizer(options={'betas': (0.9, 0.95)})

    Source:
        8-bit and paged: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861. The papers of the others are in the
        table of the how-to page.

    """

    def __init__(
        self,
        name: str = "adamw_8bit",
        *,
        options: dict[str, Any] | None = None,
        keep_32bit: str | Sequence[str] = "auto",
    ) -> None:
        problems = name_problems(name)
        if not problems:
            problems = option_problems(OPTIMIZERS[name], options or {})
        problems += keep_32bit_problems(keep_32bit)
        raise_problems("LowMemoryOptimizer", problems)
        self.name = name
        self.options = options
        self.keep_32bit = keep_32bit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook configure_optimizers of this run."""
        super().setup(trainer, pl_module, stage)
        session = Session.of(trainer)
        first = session.methods["LowMemoryOptimizer"]
        if first is not self:
            raise ConfigurationError(
                f"LowMemoryOptimizer: asked for twice, {first.describe()} and {self.describe()}. Keep one of them."
            )
        if stage == "fit":
            session.on_optimizers(pl_module, lambda configured: self._swap(configured, session, pl_module))

    def _swap(self, configured: Any, session: Session, module: LightningModule) -> Any:
        replaced, swaps = swap_optimizers(
            configured, module, OPTIMIZERS[self.name], options=self.options or {}, keep_32bit=self.keep_32bit
        )
        for swap in swaps:
            session.report("LowMemoryOptimizer", _line(swap))
        return replaced

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the precision fits what will be trained."""
        check_precision(trainer, pl_module)


def _line(swap: Swapped) -> str:
    after = format_bytes(swap.state_bytes_after)
    notes = "".join(f"; {note}" for note in swap.notes)
    if swap.new is swap.old:
        return f"{type(swap.new).__name__}, state {after}{notes}"
    before = "unknown" if swap.state_bytes_before is None else format_bytes(swap.state_bytes_before)
    return f"{type(swap.old).__name__} -> {type(swap.new).__name__}, state {before} -> {after}{notes}"
