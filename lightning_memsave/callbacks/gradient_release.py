"""Step the optimizer inside backward, so that no full set of gradients ever exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_memsave.callbacks._lightning import NAMESPACES, strategy_kind
from lightning_memsave.callbacks._precision_checks import check_precision
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session, hook_instance
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.optim.release import Accumulate, Clipping, GradientReleaser, release_problems
from lightning_memsave.optim.zero_grad import gradient_bytes
from lightning_memsave.planner.compatibility import SHARDED_STRATEGIES
from lightning_memsave.units import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GradientRelease"]

_NAME = "GradientRelease"
_NORM_CHOICES = (
    "Write clip='two_pass' (the same norm; the backward runs twice), clip='per_parameter' (the norm of each gradient "
    "by itself: another rule), or gradient_clip_algorithm='value'"
)
_READERS = ("on_after_backward", "on_before_optimizer_step")


class GradientRelease(Saver):
    """Step each parameter inside backward, as soon as its gradient is complete.

    The optimizer is the one of ``configure_optimizers``, called with one parameter at a time: its state, schedulers,
    logged learning rates and checkpoints are those of ordinary training, and a run may go on with or without this
    callback. Lightning's own ``optimizer.step`` follows as ever and finds no gradients.

    **Saves** all gradients but one: ``itemsize`` bytes a trainable parameter (4 in fp32) become those of the largest
    tensor. With ``accumulate="host"`` they wait in host memory between the batches of a window; with ``"device"``
    they stay on the device and only the optimizer's temporaries shrink. A model compiled as a whole returns its
    gradients at once: compile its blocks.
    **Costs** one call of the optimizer a parameter. ``clip="two_pass"``: a second backward, and activations that stay
    until the first one is over. ``accumulate="host"``: a copy of each gradient to the host and back, every batch.
    ``on_after_backward`` and ``on_before_optimizer_step`` see no gradients: what logs their norms logs nothing.
    **Numerics** are bitwise equal, with ``clip="two_pass"`` and accumulation too; ``"per_parameter"`` is another rule.
    **Does not combine with** manual optimization, loss scaling (``16-mixed``), DDP (its buckets hold a full set of
    gradients; ``strategy="memsave_ddp"`` does not), FSDP1, DeepSpeed, and optimizers whose step looks at all
    gradients at once (LBFGS, schedule-free, Prodigy, D-Adaptation).

    Args:
        clip: What ``Trainer(gradient_clip_val=...)`` with ``gradient_clip_algorithm="norm"`` becomes, since the norm of
            all gradients is not known before the last of them: ``refuse``, ``two_pass`` (the same norm) or
            ``per_parameter`` (the norm of each gradient by itself). Clipping by value needs no choice.
        accumulate: Where gradients wait under ``Trainer(accumulate_grad_batches=...)``: ``refuse``, ``host`` or
            ``device``.

    Raises:
        ConfigurationError: At construction, for an unknown value; at ``fit``, for anything that needs all gradients.

    Example:
        >>> from lightning_memsave import GradientRelease
        >>> GradientRelease(clip="two_pass", accumulate="host")
        GradientRelease(clip='two_pass', accumulate='host')

    Source:
        Lv et al. 2023 (LOMO, the two backward passes), https://arxiv.org/abs/2306.09782.

    """

    def __init__(
        self,
        *,
        clip: Literal["refuse", "two_pass", "per_parameter"] = "refuse",
        accumulate: Literal["refuse", "host", "device"] = "refuse",
    ) -> None:
        choices = {
            "clip": (clip, ("refuse", "two_pass", "per_parameter")),
            "accumulate": (accumulate, _accumulations()),
        }
        problems = [
            f"{name}={value!r} must be one of {', '.join(map(repr, known))}."
            for name, (value, known) in choices.items()
            if value not in known
        ]
        raise_problems(_NAME, problems)
        self.clip = clip
        self.accumulate = accumulate

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what needs all gradients at once, before anything has trained."""
        first = Session.of(trainer).methods[_NAME]
        if first is not self:
            raise ConfigurationError(f"{_NAME}: asked for twice, {first!r} and {self!r}. Keep one of them.")
        check_precision(trainer, pl_module)
        raise_problems(_NAME, [*_module_problems(self, trainer, pl_module), *_trainer_problems(self, trainer)])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, after a checkpoint was loaded: loading replaces the optimizer's groups."""
        session = Session.of(trainer)
        session.shared(_NAME, lambda: _Run(self, session, pl_module)).report()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Forget what an unfinished window left."""
        run = _find(trainer)
        if run is not None:
            run.before_zero_grad()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Step what a window holds whose last batch had no loss."""
        run = _find(trainer)
        if run is not None:
            run.before_step(optimizer)


class _Run:
    """One fit: the releaser, and where in Lightning's loop it is."""

    def __init__(self, owner: GradientRelease, session: Session, module: Any) -> None:
        self.owner = owner
        self.session = session
        self.module = module
        strategy = session.trainer.strategy
        self.releaser = GradientReleaser(
            session.trainer.optimizers[0],
            accumulate=owner.accumulate,
            module=module,
            register=getattr(strategy, "register_reduced_hook", None),
            register_sending=getattr(strategy, "register_sending_hook", None),
        )
        self.stepping = False  # inside of optimizer.step(closure): the backward is the last one before a step
        self.backwards = 0  # of this step
        self.probe = _overrides(module, "optimizer_zero_grad")
        self.undo = [
            hook_instance(strategy, "optimizer_step", self._optimizer_step),
            hook_instance(strategy.precision_plugin, "backward", self._backward),
            hook_instance(strategy.precision_plugin, "clip_gradients", self._clip_rest),
        ]

    def close(self) -> None:
        while self.undo:
            self.undo.pop()()
        self.releaser.close()

    def report(self) -> None:
        trainer = self.session.trainer
        optimizer = self.releaser.optimizer
        whole = gradient_bytes([optimizer], expected=True)
        largest = max((gradient_bytes_of(p) for g in optimizer.param_groups for p in g["params"]), default=0)
        line = f"{type(optimizer).__name__} steps inside backward: {format_bytes(whole)} of gradients -> "
        line += f"{format_bytes(largest)}, the largest tensor"
        clip = self._clipping()
        if clip is not None:
            line += _CLIPS[clip.kind].format(limit=clip.limit)
        elif self.owner.clip != "refuse":
            line += f"; clip={self.owner.clip!r} has nothing to do: the Trainer does not clip by norm"
        if trainer.accumulate_grad_batches > 1:
            line += f"; {trainer.accumulate_grad_batches} batches are accumulated on the {self.owner.accumulate}"
        self.session.report(_NAME, line)
        readers = _gradient_readers(trainer, self.module)
        if readers:
            self.session.report(_NAME, f"sees no gradients: {', '.join(readers)}")

    # -- Lightning's loop -----------------------------------------------------------------------------------------
    def _optimizer_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self.stepping, self.backwards = True, 0
        try:
            return inner(*args, **kwargs)
        finally:
            self.stepping = False

    def _backward(self, inner: Any, loss: Any, *args: Any, **kwargs: Any) -> None:
        if self.releaser.unmark():
            raise ConfigurationError(
                f"{_NAME}: {type(self.module).__name__}.optimizer_zero_grad sets gradients to zero instead of None, "
                "so parameters without a gradient would be stepped too. Write optimizer.zero_grad(set_to_none=True)."
            )
        self.backwards += self.stepping
        if self.backwards > 1:
            raise ConfigurationError(
                f"{_NAME}: {type(self.releaser.optimizer).__name__}.step runs the closure more than once, and the "
                "parameters were stepped by the first. Remove GradientRelease, or choose another optimizer."
            )
        self.releaser.backward(
            loss,
            last=self.stepping,
            clip=self._clipping(),
            run=lambda loss, **options: inner(loss, *args, **{**kwargs, **options}),
        )

    def _clip_rest(self, inner: Any, *args: Any, **kwargs: Any) -> None:
        if gradient_bytes([self.releaser.optimizer]):  # made by a hook of the user's, after the backward
            inner(*args, **kwargs)

    def before_zero_grad(self) -> None:
        self.releaser.drop()
        if self.probe:
            self.probe = False
            self.releaser.mark()

    def before_step(self, optimizer: Any) -> None:
        if optimizer is not self.releaser.optimizer:
            raise ConfigurationError(
                f"{_NAME}: the optimizer was replaced during training ({type(self.releaser.optimizer).__name__} by "
                f"{type(optimizer).__name__}), and gradients were given to the old one. Start a new fit."
            )
        self.releaser.flush(self._clipping())

    def _clipping(self) -> Clipping | None:
        """Read the Trainer's settings, which callbacks may change during training."""
        trainer = self.session.trainer
        limit = trainer.gradient_clip_val
        if not limit or limit <= 0:
            return None
        if _by_value(trainer):
            return Clipping(limit=limit, kind="value")
        if self.owner.clip == "refuse":
            raise ConfigurationError(f"{_NAME}: gradient_clip_val={limit!r} was set during training. {_NORM_CHOICES}.")
        return Clipping(limit=limit, kind=self.owner.clip)


_CLIPS = {
    "value": "; clipped by value at {limit:g}",
    "two_pass": "; clipped at norm {limit:g} with a second backward",
    "per_parameter": "; each gradient clipped at norm {limit:g} by itself, which is not the Trainer's norm of all",
}


def _find(trainer: Any) -> _Run | None:
    session = Session.find(trainer)
    run = session.find_shared(_NAME) if session is not None else None
    return run if isinstance(run, _Run) else None


def _accumulations() -> tuple[str, ...]:
    return get_args(Accumulate)


def gradient_bytes_of(p: Any) -> int:
    """Return the bytes of a parameter's gradient, 0 if it is frozen."""
    return int(p.nbytes) if p.requires_grad else 0


def _overrides(module: Any, method: str) -> bool:
    stock = [getattr(namespace.LightningModule, method) for namespace in NAMESPACES]
    return method in module.__dict__ or getattr(type(module), method) not in stock


def _by_value(trainer: Any) -> bool:
    return str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value"


def _module_problems(owner: GradientRelease, trainer: Any, module: Any) -> list[str]:
    name = type(module).__name__
    if not module.automatic_optimization:
        return [
            f"{name} optimizes manually: which gradients are stepped, and when, is known only after its backward. "
            "Remove GradientRelease, or use automatic optimization."
        ]
    problems = [problem for optimizer in trainer.optimizers for problem in release_problems(optimizer)]
    if _overrides(module, "configure_gradient_clipping"):
        problems.append(
            f"{name} overrides configure_gradient_clipping, which needs all gradients at once. "
            "Remove it and write Trainer(gradient_clip_val=...)."
        )
    if owner.clip == "two_pass" and _overrides(module, "backward"):
        problems.append(
            f"{name} overrides backward, and clip='two_pass' runs it twice. Remove the override, or write "
            "clip='per_parameter'."
        )
    return problems


def _trainer_problems(owner: GradientRelease, trainer: Any) -> list[str]:
    problems = []
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        problems.append(
            f"precision={trainer.precision!r} scales the loss, and a step is skipped when any gradient overflows: all "
            "must be seen before it. Write precision='bf16-mixed'."
        )
    limit = trainer.gradient_clip_val
    by_norm = bool(limit) and limit > 0 and not _by_value(trainer)
    if by_norm and owner.clip == "refuse":
        problems.append(
            f"gradient_clip_val={limit!r} clips by the norm of all gradients, which never exist together. "
            f"{_NORM_CHOICES}."
        )
    checkpointing = Session.of(trainer).methods.get("ActivationCheckpointing")
    if by_norm and owner.clip == "two_pass" and getattr(checkpointing, "policy", "") == "selective":
        problems.append(
            "clip='two_pass' runs the backward twice, and ActivationCheckpointing(policy='selective') keeps results "
            "for one. Write policy='full'."
        )
    batches = trainer.accumulate_grad_batches
    if batches > 1 and owner.accumulate == "refuse":
        problems.append(
            f"accumulate_grad_batches={batches!r} keeps gradients between batches. Write accumulate='host' (in host "
            "memory) or accumulate='device'."
        )
    kind = strategy_kind(trainer.strategy)
    reduces = hasattr(trainer.strategy, "register_reduced_hook")
    if trainer.world_size > 1 and not reduces and kind not in ("single", *SHARDED_STRATEGIES):
        problems.append(
            f"{type(trainer.strategy).__name__} is not known to have averaged a gradient over the ranks when autograd "
            "is done with it. Use strategy='memsave_ddp', or ModelParallelStrategy."
        )
    return problems


def _gradient_readers(trainer: Any, module: Any) -> list[str]:
    """Return the hooks of the module and of the user's callbacks that run when gradients used to exist."""
    found = [f"{type(module).__name__}.{method}" for method in _READERS if _overrides(module, method)]
    for callback in trainer.callbacks:
        theirs = type(callback).__module__.partition(".")[0]
        if theirs in ("lightning_memsave", "lightning", "pytorch_lightning"):
            continue
        for method in _READERS:
            stock = [getattr(namespace.Callback, method) for namespace in NAMESPACES]
            if getattr(type(callback), method, stock[0]) not in stock:
                found.append(f"{type(callback).__name__}.{method}")
    return found
