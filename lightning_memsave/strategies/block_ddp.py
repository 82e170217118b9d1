"""Train on several devices with gradients averaged inside backward, without a second copy of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.utils.hooks import RemovableHandle

from lightning_memsave.callbacks._lightning import of_every_namespace
from lightning_memsave.callbacks._session import Session, logger
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.parallel.block_reduce import BlockReducer
from lightning_memsave.parallel.same_state import broadcast_tensors, state_tensors
from lightning_memsave.strategies._either import EitherTrainer
from lightning_memsave.units import format_bytes, parse_size

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.strategies import DDPStrategy
else:
    DDPStrategy = of_every_namespace("strategies.DDPStrategy")

__all__ = ["BlockDDPStrategy"]

_NAME = "BlockDDPStrategy"
# Arguments of DDPStrategy and DistributedDataParallel that have no meaning here, and what to write instead.
_ELSEWHERE = {
    "accelerator": "write Trainer(accelerator=...)",
    "parallel_devices": "write Trainer(devices=...)",
    "find_unused_parameters": "parameters without a gradient are always found and handled; leave it out",
    "static_graph": "nothing is assumed about the graph; leave it out",
    "gradient_as_bucket_view": "there is no second copy of the gradients to avoid; leave it out",
    "bucket_cap_mb": 'write bucket_size="25MiB"',
    "forward_sync_buffers": "write broadcast_buffers",
}
_DDP_ONLY = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period")


class BlockDDPStrategy(EitherTrainer, DDPStrategy):
    """Train data-parallel with gradients averaged block by block inside backward.

    As ``strategy="ddp"``, for any module and unchanged: each rank holds the whole model and a part of the batch.
    Registered as ``"memsave_ddp"``. Parameters without a gradient, on some ranks or on all, need no option.

    **Saves** the buckets of DistributedDataParallel, a second copy of all gradients: ``itemsize`` bytes a trained
    parameter (4 in fp32). With ``GradientRelease``, which stock DDP makes useless, nearly all gradients.
    **Costs** 4 to 10 % of a step's time over DDP on two CPU processes with gloo (19M parameters), and up to three
    buckets of extra memory during backward. A parameter without a gradient holds back those that come after it until
    the end of that backward (what some rank did not use in the first one comes last), and a module compiled as a whole
    gives all its gradients at the end: compile its blocks.
    **Numerics** are bitwise those of DDP with ``find_unused_parameters=True`` on two ranks; on more, sums are rounded
    in another order.
    **Does not combine with** communication hooks, sparse gradients, and parameters that are sharded already.

    Args:
        bucket_size: Largest size of the gradients that are averaged in one message, an int of bytes or a text. A larger
            gradient is averaged alone, in place.
        broadcast_buffers: Whether rank zero's buffers (e.g. of batch norm) go to all ranks before a step, as under DDP.
        cluster_environment: As in Lightning's ``DDPStrategy``: which processes take part; found by the Trainer.
        process_group_backend: As there: ``gloo``, ``nccl`` ...; by default that of the accelerator.
        timeout: As there: how long a rank waits for the others.
        start_method: As there: ``popen`` (the script is started again), ``spawn``, ``fork`` or ``forkserver``.
        checkpoint_io: As there.
        precision_plugin: As there; rather write ``Trainer(precision=...)``.
        **ddp_only: Other arguments of ``DDPStrategy``, which are refused with what to write instead.

    Raises:
        ConfigurationError: At construction, for an argument that has no meaning here; at ``fit``, if the ranks do not
            train the same parameters, or one that cannot be averaged.

    Example:
        >>> from lightning_memsave import BlockDDPStrategy
        >>> strategy = BlockDDPStrategy(bucket_size="8MiB", process_group_backend="gloo")

    Source:
        Li et al. 2020, PyTorch Distributed, https://arxiv.org/abs/2006.15704; Lv et al. 2023 (gradients released in
        backward), https://arxiv.org/abs/2306.09782.

    """

    def __init__(
        self,
        *,
        bucket_size: int | str = "25MiB",
        broadcast_buffers: bool = True,
        cluster_environment: ClusterEnvironment | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **ddp_only: Any,
    ) -> None:
        raise_problems(_NAME, [*_size_problems(bucket_size), *_argument_problems(ddp_only)])
        super().__init__(
            cluster_environment=cluster_environment,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.bucket_size = bucket_size
        self.broadcast_buffers = broadcast_buffers
        self._hooks: OrderedDict[int, Callable[[nn.Parameter], Any]] = OrderedDict()
        self._sending_hooks: OrderedDict[int, Callable[[nn.Parameter], Any]] = OrderedDict()
        self._reducer: BlockReducer | None = None
        self._group: dist.ProcessGroup | None = None
        self._buffers_differ = False
        self._blocked = False

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the name of this strategy and no other."""
        from lightning_memsave.strategies._registry import register_names

        register_names(strategy_registry)

    def register_reduced_hook(self, function: Callable[[nn.Parameter], Any]) -> RemovableHandle:
        """Call ``function(parameter)`` inside backward once ``parameter.grad`` holds the average over the ranks.

        The hook may free the gradient. It is called for the same parameters on every rank, and not during the backward
        passes of accumulated batches, whose gradients are not averaged yet.

        Args:
            function: Called with each parameter that got a gradient on some rank.

        Returns:
            A handle with ``remove()``.

        """
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = function
        return handle

    def register_sending_hook(self, function: Callable[[nn.Parameter], Any]) -> RemovableHandle:
        """Call ``function(parameter)`` inside backward before this rank's gradient is sent; it may add to it.

        For what keeps the gradients of accumulated batches elsewhere.

        Args:
            function: Called with every trained parameter; the gradient is ``None`` if the last batch gave it none.

        Returns:
            A handle with ``remove()``.

        """
        handle = RemovableHandle(self._sending_hooks)
        self._sending_hooks[handle.id] = function
        return handle

    @property
    def _module(self) -> LightningModule:
        module = self.lightning_module
        assert module is not None
        return module

    # -- life -----------------------------------------------------------------------------------------------------
    def configure_ddp(self) -> None:
        """Make the copies equal and put hooks on the parameters, where Lightning would wrap the module."""
        module = self._module
        ignored = list(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        # Synchronized batch norm has collectives of its own inside backward: ours must not stand between them.
        apart = any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
        self._group = dist.new_group(timeout=self._timeout) if apart and dist.get_world_size() > 1 else None
        self._reducer = BlockReducer(
            module,
            bucket_bytes=parse_size(self.bucket_size),
            group=self._group,
            ignored=ignored,
            hooks=self._hooks,
            sending_hooks=self._sending_hooks,
            on_unused=self._say_unused,
            subject=_NAME,
        )
        if self._reducer.world_size > 1:
            broadcast_tensors(state_tensors(module, ignored), self._group)
        self._buffers_differ = False
        parameters = self._reducer.parameters
        size = format_bytes(sum(p.numel() * p.itemsize for p in parameters))
        self._say(
            f"{self._reducer.world_size} ranks average {len(parameters)} gradients ({size}) in "
            f"{len(self._reducer.buckets)} message{'s' if len(self._reducer.buckets) != 1 else ''} inside backward"
        )

    def teardown(self) -> None:
        """Take the hooks away."""
        if self._reducer is not None:
            self._reducer.close()
            self._reducer = None
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
        super().teardown()

    # -- steps ----------------------------------------------------------------------------------------------------
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward, with gradients averaged inside it."""
        if self._reducer is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        with self._reducer.watch(closure_loss):
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients add up on this rank, for all batches of an accumulation but the last."""
        if self._reducer is None:
            yield
            return
        before, self._blocked = self._blocked, True
        try:
            with self._reducer.no_sync():
                yield
        finally:
            self._blocked = before

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step on equal buffers."""
        self._equal_buffers()
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._buffers_differ = not self._blocked

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step on equal buffers."""
        self._equal_buffers()
        return super().validation_step(*args, **kwargs)

    def _equal_buffers(self) -> None:
        """Take rank zero's buffers, at the points where DistributedDataParallel does."""
        if self._reducer is None or not self._buffers_differ or not self.broadcast_buffers:
            return
        self._buffers_differ = False
        if self._reducer.world_size > 1:
            left_out = set(self._reducer.ignored)
            buffers = [b.detach() for name, b in self._module.named_buffers() if name not in left_out]
            broadcast_tensors(buffers, self._group)

    # -- report ---------------------------------------------------------------------------------------------------
    def _say(self, line: str) -> None:
        session = Session.find(self._module.trainer)
        if session is not None:
            session.report(_NAME, line)
        elif self.is_global_zero:
            logger.info("[memsave] %s: %s", _NAME, line)

    def _say_unused(self, names: list[str], everywhere: bool) -> None:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        if everywhere:
            self._say(f"no rank has a gradient for {shown} in this step; left as they are, as under DDP")
        else:
            logger.info(
                "[memsave] %s: rank %d has no gradient for %s in this step, others do; it takes part with zeros",
                _NAME,
                self.global_rank,
                shown,
            )


def _size_problems(bucket_size: object) -> list[str]:
    try:
        size = parse_size(bucket_size)  # type: ignore[arg-type]
    except ConfigurationError as error:
        return [f"bucket_size: {error}"]
    return [] if size > 0 else [f'bucket_size={bucket_size!r} holds nothing. Write a size such as "25MiB".']


def _argument_problems(arguments: dict[str, Any]) -> list[str]:
    problems = []
    for name in arguments:
        if name in _ELSEWHERE:
            problems.append(f"{name}: {_ELSEWHERE[name]}.")
        elif name in _DDP_ONLY:
            problems.append(f'{name}: gradients are averaged as they are here. Use strategy="ddp" for it.')
        else:
            problems.append(
                f"{name} is no argument of this strategy. It has bucket_size, broadcast_buffers, cluster_environment, "
                "process_group_backend, timeout, start_method, checkpoint_io and precision_plugin."
            )
    return problems
