"""``ActivationOffloading``: what blocks save for backward waits in host memory or on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_memsave._match import Patterns, as_patterns
from lightning_memsave.callbacks._session import Session
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.memory.host import host_available_bytes
from lightning_memsave.transforms._pass import Applied, Stage
from lightning_memsave.transforms.offloading import describe_store, offload_blocks, offloader_of
from lightning_memsave.units import parse_size

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ActivationOffloading"]


class ActivationOffloading(ModelTransform):
    """Keep what blocks save for backward in host memory or on disk.

    **Saves** everything the blocks save for backward except two blocks' worth: the one in backward and the one that
    is fetched ahead. With ``ActivationCheckpointing`` that is the input of each block,
    ``batch * tokens * hidden * itemsize`` bytes. Storages below ``min_bytes``, weights and buffers stay.
    **Costs** one copy each way; on CUDA from and to pinned memory on a stream of its own, beside the computation. The
    same bytes of host memory, or of the directory.
    **Numerics** are bitwise equal.
    **Does not combine with** ``device="cpu"`` on a module that trains on the CPU. Compiled regions are left alone.

    Args:
        modules: ``"auto"`` finds the repeated blocks. Else one glob over qualified module names, a class name, or a
            list of them; of nested matches the outermost is taken.
        device: ``"cpu"`` for host memory, or a directory; its files are removed at the end.
        host_budget: Bytes that may be held there, e.g. ``"64GiB"``; what is beyond stays on the accelerator. ``None``
            is half of the host memory that is free at the start, and no limit for a directory.
        min_bytes: Smaller storages stay: a copy costs more than they hold.

    Raises:
        ConfigurationError: At construction, for a wrong argument; at ``fit``, if the activations are in host memory
            anyway.
        NothingToTransformError: At ``fit``, if nothing repeats or a pattern matched nothing.

    Example:
        >>> from lightning_memsave import ActivationOffloading
        >>> ActivationOffloading(device="/tmp/activations")
        ActivationOffloading(device='/tmp/activations')

    Source:
        ``torch.autograd.graph.saved_tensors_hooks``; offloading with prefetch: Rhu et al. 2016 (vDNN),
        https://arxiv.org/abs/1602.08124.

    """

    stage = Stage.OFFLOAD

    def __init__(
        self,
        modules: Patterns = "auto",
        device: str | Path = "cpu",
        *,
        host_budget: int | str | None = None,
        min_bytes: int | str = "64KiB",
    ) -> None:
        self.modules = modules
        self.device = device
        self.host_budget = host_budget
        self.min_bytes = min_bytes
        as_patterns(modules, subject=type(self).__name__)
        problems = []
        if not isinstance(device, (str, Path)) or str(device) == "":  # type: ignore[redundant-expr]
            problems.append(f'device={device!r} must be "cpu" or a directory.')
        elif str(device).split(":")[0] in ("cuda", "gpu", "disk", "nvme", "meta", "mps", "xpu"):
            problems.append(f'device={device!r} is no place away from the accelerator. Write "cpu" or a directory.')
        elif Path(device).is_file():
            problems.append(f"device={str(device)!r} is a file. Write a directory.")
        for name, size in (("host_budget", host_budget), ("min_bytes", min_bytes)):
            try:
                parse_size(0 if size is None else size)
            except (ValueError, TypeError) as error:
                problems.append(f"{name}={size!r}: {error}")
        raise_problems(type(self).__name__, problems)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the transform on the run's pass."""
        if str(self.device) == "cpu" and trainer.strategy.root_device.type == "cpu":
            raise ConfigurationError(
                'ActivationOffloading: device="cpu" was asked for, and this Trainer trains on the CPU, where '
                "activations are in host memory already. Write device=<directory> to keep them on disk, or use "
                "ActivationCheckpointing."
            )
        super().setup(trainer, pl_module, stage)

    def apply(self, module: nn.Module) -> Applied:
        """Offload the selected blocks, in place."""
        patterns = as_patterns(self.modules, subject=type(self).__name__)
        return offload_blocks(
            module,
            patterns,
            device=self._device,
            host_budget=self._budget(),
            min_bytes=parse_size(self.min_bytes),
        )

    @property
    def _device(self) -> str | Path:
        return "cpu" if str(self.device) == "cpu" else Path(self.device)

    def _budget(self) -> int | None:
        if self.host_budget is not None:
            return parse_size(self.host_budget)
        free = host_available_bytes() if self._device == "cpu" else None
        return None if free is None else free // 2

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once what was put away."""
        if batch_idx > 0 or trainer.current_epoch > 0:
            return
        offloader = offloader_of(pl_module)
        if offloader is None:
            return
        store = offloader.store
        if store is None:
            line = f"inactive: in the first step no block saved a tensor of {self.min_bytes} or more"
            Session.of(trainer).report(type(self).__name__, line, warning=True)
        else:
            Session.of(trainer).report(type(self).__name__, describe_store(store), warning=bool(store.refused))
