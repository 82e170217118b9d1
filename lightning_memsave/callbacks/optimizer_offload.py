"""Keep optimizer state on the host or on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning_memsave.callbacks._offload_runs import EvaluationRun, HostRun, MappedCheckpoints, run_problems
from lightning_memsave.callbacks._precision_checks import check_precision
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.optim.disk_state import directory_problems
from lightning_memsave.units import parse_size

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["OptimizerOffload"]

_NAME = "OptimizerOffload"
_NOT_A_DIRECTORY = ("cuda", "gpu", "mps", "xpu", "nvme", "disk", "none", "")


class OptimizerOffload(Saver):
    """Keep optimizer state on the host or on disk, and step there.

    The optimizer is the one of ``configure_optimizers`` with its own update rule, called for one bucket of parameters
    after the other: param groups, schedulers, clipping, accumulation, logged learning rates and checkpoints are those
    of ordinary training, and a run may go on with or without this callback.

    **Saves** all optimizer state on the device: 8 bytes a trained fp32 value under AdamW. ``gradients=True``: their
    ``itemsize`` bytes too, but for the largest tensor. A directory: the same 8 bytes of host memory.
    **Costs** two copies of weights and gradients a step and the step on the host. Host memory: the state, staging for
    three buckets (``3 * 2 * 32 MiB``, or twice the largest parameter), with ``gradients=True`` all gradients (pinned).
    With ``gradients=True`` and nothing that needs all gradients (clipping, ``on_before_optimizer_step``), buckets are
    stepped while backward goes on. A directory: reading and writing the state in each step.
    **Numerics** are bitwise equal where the parameters are on the host already; elsewhere the host's kernels round
    differently from the device's. ``master_weights=True`` is more exact than 16-bit training without it.
    **Does not combine with** LBFGS, schedule-free and Prodigy-like optimizers, paged optimizers, ``capturable=True``,
    FSDP1 and DeepSpeed; under FSDP2 only ``when="evaluation"``.

    Args:
        device: ``cpu`` (host memory), or a directory on a local disk for state in memory-mapped files. The files have
            no name and vanish with the process; checkpoints hold their values.
        gradients: Move each gradient to the host as soon as it is complete. ``on_after_backward`` and
            ``on_before_optimizer_step`` then see none. Automatic optimization with one optimizer only.
        master_weights: Keep an fp32 weight of every trained 16-bit parameter in the state and step that.
        when: ``always``, or ``evaluation``: the state stays on the device and waits on the host during the validation
            inside of a fit, and with it a moving average of the weights (``WeightAveraging``).
        host_budget: Host memory this may take on a machine, e.g. ``"64GiB"``; by default what is available at the
            start of the fit.

    Raises:
        ConfigurationError: At construction, for a wrong value; at ``fit``, if the optimizer cannot be stepped in
            parts, or host memory or disk do not suffice.

    Example:
        >>> from lightning_memsave import OptimizerOffload
        >>> OptimizerOffload(gradients=True)
        OptimizerOffload(gradients=True)

    Source:
        Ren et al. 2021 (ZeRO-Offload), https://arxiv.org/abs/2101.06840.

    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        gradients: bool = False,
        master_weights: bool = False,
        when: Literal["always", "evaluation"] = "always",
        host_budget: int | str | None = None,
    ) -> None:
        problems = _place_problems(device)
        switches: dict[str, Any] = {"gradients": gradients, "master_weights": master_weights}
        problems += [f"{k}={v!r} must be true or false." for k, v in switches.items() if not isinstance(v, bool)]
        if when not in ("always", "evaluation"):
            problems.append(f"when={when!r} must be 'always' or 'evaluation'.")
        elif when == "evaluation" and (device != "cpu" or gradients or master_weights):
            problems.append("when='evaluation' steps on the device: leave device, gradients and master_weights out.")
        if host_budget is not None:
            try:
                parse_size(host_budget)
            except ConfigurationError as error:
                problems.append(f"host_budget: {error}")
        raise_problems(_NAME, problems)
        self.device = device
        self.gradients = gradients
        self.master_weights = master_weights
        self.when = when
        self.host_budget = host_budget

    # -- life -----------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read and write checkpoints without holding all state in memory, where it is on disk."""
        super().setup(trainer, pl_module, stage)
        session = Session.of(trainer)
        first = session.methods[_NAME]
        if first is not self:
            raise ConfigurationError(f"{_NAME}: asked for twice, {first!r} and {self!r}. Keep one of them.")
        if stage == "fit" and self.device != "cpu":
            session.shared(f"{_NAME}.checkpoints", lambda: MappedCheckpoints(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the state: optimizers and schedulers are complete, and a checkpoint's states are not yet loaded."""
        check_precision(trainer, pl_module)
        session = Session.of(trainer)
        raise_problems(_NAME, run_problems(self, session, pl_module))
        if self.when == "always":
            session.shared(_NAME, lambda: HostRun(self, session, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide what may be stepped inside of backward, when all callbacks are known."""
        run = Session.of(trainer).find_shared(_NAME)
        if isinstance(run, HostRun):
            run.start()

    # -- between phases -------------------------------------------------------------------------------------------
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move what the validation does not use to the host."""
        if self.when == "evaluation" and trainer.state.fn == "fit":
            session = Session.of(trainer)
            session.shared(_NAME, lambda: EvaluationRun(self, session)).begin()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Move the copy of the weights that waits meanwhile, once averaged and present weights were exchanged."""
        run = _evaluation(trainer)
        if run is not None and batch_idx == 0 and dataloader_idx == 0:
            run.park_averages()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move everything back."""
        run = _evaluation(trainer)
        if run is not None:
            run.end()


def _place_problems(device: object) -> list[str]:
    if not isinstance(device, str) or device.partition(":")[0] in _NOT_A_DIRECTORY:
        return [f"device={device!r} is neither 'cpu' nor a directory."]
    return [] if device == "cpu" else directory_problems(device)


def _evaluation(trainer: Trainer) -> EvaluationRun | None:
    session = Session.find(trainer)
    run = session.find_shared(_NAME) if session is not None else None
    return run if isinstance(run, EvaluationRun) else None
