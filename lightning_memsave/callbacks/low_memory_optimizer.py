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

    **Saves** per trained fp32 value, against the 8 bytes of AdamW: ``adamw_8bit`` and ``paged_adamw_8bit`` hold
    ``2 + 8 / 256`` bytes, ``lion_8bit`` ``1 + 4 / 256``, ``lion`` 4, ``adafactor`` about 0 (one row and one column a
    matrix), ``paged_adamw_32bit`` 8 that move to the host when the accelerator is full.
    **Costs** the conversion of the state in every step. On a CPU large tensors are stepped in slices, without the four
    (fp32 state: three) copies of the largest tensor that bitsandbytes makes there, and in half the time.
    **Numerics** are statistical: 8-bit AdamW follows AdamW closely, Lion and Adafactor are other update rules. The
    state of embeddings and norms, and of tensors below 4096 values, stays fp32.
    **Does not combine with** FSDP2, on whose sharded parameters none of these optimizers steps. LBFGS, schedule-free
    and Prodigy-like optimizers are refused.

    Args:
        name: ``adamw_8bit``, ``paged_adamw_8bit``, ``paged_adamw_32bit``, ``lion_8bit``, ``lion`` or ``adafactor``.
        options: Hyper-parameters for every group, e.g. ``{"betas": (0.9, 0.95)}``; they win over those of the replaced
            optimizer. The learning rates stay those of ``configure_optimizers``.
        keep_32bit: Modules whose state stays 32-bit: ``"auto"`` (embeddings and norms), globs or class names, or an
            empty list for none.

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
        8-bit and paged: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861. Lion: Chen et al. 2023,
        https://arxiv.org/abs/2302.06675. Adafactor: Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235.

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
