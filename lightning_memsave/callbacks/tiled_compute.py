"""``TiledCompute``: position-wise modules in slices of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_memsave._match import as_patterns
from lightning_memsave.callbacks._session import Session
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._pass import Applied, Stage
from lightning_memsave.transforms.tiling import DEFAULT_PATTERNS, tile_counts, tile_modules

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["TiledCompute"]


class TiledCompute(ModelTransform):
    """Run MLPs and norms over slices of the sequence, forward and backward.

    **Saves** what a tiled module keeps and allocates between its input and its output: for an MLP of width
    ``intermediate``, ``k * batch * (tokens - tile_tokens) * intermediate * itemsize`` bytes with ``k`` about 4, at the
    peak of the block that is being computed.
    **Costs** one more forward of the tiled modules per backward, and for bf16 weights an fp32 sum of their gradients
    while one module's backward runs.
    **Numerics** are those of the module up to the order in which tiles of a weight's gradient are added. Dropout draws
    a mask for each tile, so single values differ from an untiled run; the recompute repeats them.
    **Does not combine with** modules that mix positions (attention, convolutions, batch norm), that take or return
    several tensors: they are refused, by a probe at their first long input. Under ``create_graph=True`` nothing is
    saved.

    Args:
        modules: Globs over qualified module names, or class names; of nested matches the outermost is taken.
        tile_tokens: Positions in a slice. Shorter inputs run as they are.

    Raises:
        ConfigurationError: At construction, for a wrong argument; while training, if a module is not position-wise.
        NothingToTransformError: At ``fit``, if a pattern matched nothing.

    Example:
        >>> from lightning_memsave import TiledCompute
        >>> TiledCompute(["*.mlp"], tile_tokens=2048)
        TiledCompute(modules=['*.mlp'], tile_tokens=2048)

    Source:
        Tiled MLPs: Bekman et al. 2025 (ALST), https://arxiv.org/abs/2506.13996.

    """

    stage = Stage.CHECKPOINT - 5
    repeatable = True

    def __init__(self, modules: str | Sequence[str] = DEFAULT_PATTERNS, tile_tokens: int = 4096) -> None:
        self.modules = modules
        self.tile_tokens = tile_tokens
        patterns = as_patterns(modules, subject=type(self).__name__)
        problems = []
        if "auto" in patterns:
            problems.append(
                f'modules={modules!r}: which modules are position-wise is not guessed. Leave it out ("*mlp*" and '
                '"*norm*"), or name them, e.g. ["*.mlp"].'
            )
        if type(tile_tokens) is not int or tile_tokens < 1:
            problems.append(f"tile_tokens={tile_tokens!r} must be an int of 1 or more, e.g. 4096.")
        raise_problems(type(self).__name__, problems)

    def apply(self, module: nn.Module) -> Applied:
        """Tile the selected modules, in place."""
        patterns = as_patterns(self.modules, subject=type(self).__name__)
        return tile_modules(module, patterns, tile_tokens=self.tile_tokens)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once if no input was longer than a tile."""
        if trainer.global_step != 1 or batch_idx > 0:
            return
        counts = tile_counts(pl_module).values()
        if counts and not any(count.tiled for count in counts):
            longest = max(count.longest for count in counts)
            Session.of(trainer).report(
                type(self).__name__,
                f"inactive: the first batch has {longest} tokens and a tile has {self.tile_tokens}; nothing was cut",
                warning=True,
            )
