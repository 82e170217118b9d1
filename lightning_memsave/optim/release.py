"""Step the user's own optimizer inside backward, so that a gradient lives only until its parameter is stepped.

Works in any loop::

    release = GradientReleaser(optimizer)
    for batch in batches:
        release.backward(model(batch).mean())    # instead of loss.backward(); with Fabric: run=fabric.backward
        optimizer.step()                         # finds no gradients; hooks, counters and schedulers see a step
        scheduler.step()
    release.close()
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.optim._release_hold import HeldGradients, as_stepped, local_part
from lightning_memsave.optim._release_step import ParameterStepper, release_problems

__all__ = ["Accumulate", "Clipping", "GradientReleaser", "release_problems"]

Accumulate = Literal["refuse", "host", "device"]
_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """How gradients are clipped before a step.

    Args:
        limit: The largest value or norm, above 0.
        kind: ``value``; ``two_pass``, the norm over all parameters, for which the backward runs twice; or
            ``per_parameter``, the norm of each gradient by itself.

    """

    limit: float
    kind: Literal["value", "two_pass", "per_parameter"]


class GradientReleaser:
    """Step each parameter as soon as its gradient is complete, and free the gradient.

    Args:
        optimizer: Any optimizer that treats its parameters one by one.
        accumulate: Where gradients wait for the last backward of a window: ``host``, ``device``, or ``refuse``.
        module: Gives parameters their names in messages.
        register: Registers a function to be called with each parameter whose gradient is final, and returns a handle
            with ``remove``. By default a hook of each parameter that runs when autograd has accumulated its gradient.
        register_sending: The same, called before a gradient is averaged over ranks: what is held is added then.

    Raises:
        ConfigurationError: If the optimizer cannot be stepped one parameter at a time.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        accumulate: Accumulate = "refuse",
        module: nn.Module | None = None,
        register: Callable[[Callable[[Tensor], None]], Any] | None = None,
        register_sending: Callable[[Callable[[Tensor], None]], Any] | None = None,
    ) -> None:
        raise_problems("GradientRelease", release_problems(optimizer))
        self.optimizer = optimizer
        self._module = module
        self._stepper = ParameterStepper(optimizer)
        self._held = HeldGradients(accumulate)
        self._accumulates = accumulate != "refuse"
        self._places: dict[int, tuple[int, int]] = {}
        self._hooks: dict[int, tuple[Tensor, Any]] = {}
        self._registered = register(self._on_averaged) if register is not None else None
        self._sending = register_sending(self._on_sending) if register_sending is not None else None
        self._act: Callable[[Tensor], None] | None = None
        self._seen: set[int] = set()
        self._norms: dict[int, Tensor] = {}
        self._clip: Callable[[Tensor], None] | None = None
        self._lock = threading.RLock()  # autograd runs one thread a device
        self._marked: Tensor | None = None

    # -- what a loop calls ------------------------------------------------------------------------------------------
    def backward(
        self,
        loss: Tensor,
        *,
        last: bool = True,
        clip: Clipping | None = None,
        run: Callable[..., Any] = Tensor.backward,
    ) -> None:
        """Run the backward of ``loss`` and step every parameter that gets a gradient.

        Args:
            loss: A scalar.
            last: Whether this is the last backward before a step. If not, gradients are only added up.
            clip: What to do to each gradient before its step.
            run: Runs a backward: called with ``loss``, and with ``retain_graph=True`` where a second one follows.

        Raises:
            ConfigurationError: If a parameter gets its gradient in two parts, if a weight is read after it was
                stepped, or if gradients would have to be accumulated and ``accumulate`` is ``refuse``.

        """
        self._attach()
        if not last:
            if not self._accumulates or (self._registered is not None and self._sending is None):
                raise ConfigurationError(
                    "GradientRelease: this backward is not followed by a step (accumulate_grad_batches above 1, or an "
                    "optimizer_step that runs the closure without stepping), so its gradients must be kept. "
                    "Write accumulate='host' (host memory) or accumulate='device'."
                )
            self._run(self._hold, run, loss)
            return
        if clip is not None and clip.kind == "two_pass":
            self._run(self._measure, run, loss, retain_graph=True)
        self._set_clip(clip)
        self._run(self._release, run, loss)
        self._release_held()

    def flush(self, clip: Clipping | None = None) -> None:
        """Step what is held, where a window ends without a backward of its own."""
        if not len(self._held):
            return
        self._attach()
        self._seen.clear()
        self._norms.clear()
        self._set_clip(clip)
        self._release_held()

    def drop(self) -> None:
        """Forget what is held, as ``optimizer.zero_grad()`` does with ordinary gradients."""
        self._held.clear()

    def close(self) -> None:
        """Take every hook off and free everything; a second call does nothing."""
        self._act = None
        while self._hooks:
            self._hooks.popitem()[1][1].remove()
        if self._registered is not None:
            self._registered.remove()
            self._registered = None
        if self._sending is not None:
            self._sending.remove()
            self._sending = None
        self._stepper.close()
        self._held.close()
        self.unmark()

    # -- whether a zero_grad that is not ours frees or zeroes -------------------------------------------------------
    def mark(self) -> None:
        """Give one parameter a gradient of zeros, for ``unmark`` to see what becomes of it."""
        trained = [p for p in self._parameters() if p.requires_grad and p.grad is None]
        if trained:
            self._marked = min(trained, key=Tensor.numel)
            self._marked.grad = torch.zeros_like(self._marked)

    def unmark(self) -> bool:
        """Return whether the marked gradient is still there; it is gone afterwards."""
        marked, self._marked = self._marked, None
        if marked is None or marked.grad is None:
            return False
        marked.grad = None
        return True

    # -- hooks --------------------------------------------------------------------------------------------------------
    def _parameters(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _attach(self) -> None:
        """Look at the groups as they are now: they change when a checkpoint is loaded and when layers are unfrozen."""
        places, hooks = self._places, self._hooks
        places.clear()
        for i, group in enumerate(self.optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                places[id(p)] = i, j
                if (self._registered is None or self._sending is not None) and p.requires_grad and id(p) not in hooks:
                    hook = self._on_gradient if self._registered is None else self._on_own_gradient
                    hooks[id(p)] = p, p.register_post_accumulate_grad_hook(hook)
        for key in [key for key in hooks if key not in places]:
            hooks.pop(key)[1].remove()

    def _on_gradient(self, p: Tensor) -> None:
        # A backward that is none of ours (inside of a training_step) leaves its gradients where it puts them.
        if self._act is not None and p.grad is not None and id(p) in self._places:
            with self._lock, torch.no_grad():
                self._act(p)

    def _on_averaged(self, p: Tensor) -> None:
        if self._act == self._hold:  # part of it may be held already, unaveraged
            raise ConfigurationError(
                "GradientRelease: gradients are averaged over the ranks in a backward that no step follows (an "
                "optimizer_step that runs the closure itself). Write optimizer.step(closure=optimizer_closure)."
            )
        self._on_gradient(p)

    def _on_own_gradient(self, p: Tensor) -> None:
        """Hold a gradient that is not averaged yet; those of a window are averaged together, at its end."""
        if self._act == self._hold:
            self._on_gradient(p)

    def _on_sending(self, p: Tensor) -> None:
        """Add what is held before the average is taken; a first pass keeps it for the second."""
        if self._act is None or p not in self._held:
            return
        with self._lock, torch.no_grad():
            if self._act == self._release:
                self._held.take(p)
            elif p.grad is not None:
                self._held.join(p)
            else:
                p.grad = self._held.copy(p)

    def _run(self, act: Callable[[Tensor], None], run: Callable[..., Any], loss: Tensor, **options: Any) -> None:
        self._seen.clear()
        self._act = act
        try:
            run(loss, **options)
        except RuntimeError as error:
            if act == self._release and "modified by an inplace operation" in str(error):
                raise ConfigurationError(
                    "GradientRelease: a weight is read by the backward after its gradient was complete and it was "
                    "stepped (it is used through .detach() or .data as well, or this graph was run through before). "
                    f"Remove GradientRelease, or that use of the weight. Autograd says: {error}"
                ) from error
            raise
        finally:
            self._act = None

    # -- what is done with a gradient ---------------------------------------------------------------------------------
    def _hold(self, p: Tensor) -> None:
        self._held.add(p)

    def _measure(self, p: Tensor) -> None:
        self._once(p)
        g = self._held.join(p) if self._sending is None else as_stepped(p)  # else it was added before the average
        self._norms[id(p)] = torch.linalg.vector_norm(g)
        p.grad = None

    def _release(self, p: Tensor) -> None:
        self._once(p)
        if len(self._held):
            self._held.take(p)
        if self._clip is not None:
            as_stepped(p)
            self._clip(p)
        self._stepper.step(p, self._places[id(p)])
        p.grad = None

    def _release_held(self) -> None:
        """Step the parameters that got a gradient earlier in the window and none in its last backward."""
        with torch.no_grad():
            for p in [p for p in self._parameters() if p in self._held]:
                self._held.take(p)
                self._release(p)

    def _once(self, p: Tensor) -> None:
        if id(p) in self._seen:
            raise ConfigurationError(
                f"GradientRelease: {self._name(p)} got its gradient in two parts in one backward, and the first was "
                "already used. A parameter must be done with at once: no second loss.backward() of one step, no "
                "reentrant checkpointing (use_reentrant=True) around a weight that is used elsewhere too."
            )
        self._seen.add(id(p))

    def _name(self, p: Tensor) -> str:
        named = self._module.named_parameters() if self._module is not None else ()
        return next((name for name, q in named if q is p), f"a parameter of shape {tuple(p.shape)}")

    # -- clipping -----------------------------------------------------------------------------------------------------
    def _set_clip(self, clip: Clipping | None) -> None:
        if clip is None:
            self._clip = None
        elif clip.kind == "value":
            self._clip = lambda p: _clamp(p, clip.limit)
        elif clip.kind == "per_parameter":
            self._clip = lambda p: _scale(p, _coefficient(torch.linalg.vector_norm(p.grad), clip.limit))
        else:
            coefficient = self._coefficient(clip.limit)
            self._clip = lambda p: _scale(p, coefficient)

    def _coefficient(self, limit: float) -> Tensor:
        """Return what scales all gradients, from the norms of the first backward and of what is only held."""
        with torch.no_grad():
            for p in self._parameters():
                if p in self._held and id(p) not in self._norms:
                    self._norms[id(p)] = self._held.norm(p)
            norms = [_whole(self._norms[id(p)]) for p in self._parameters() if id(p) in self._norms]
            self._norms.clear()
            if not norms:
                return torch.ones((), dtype=torch.float32, device="cpu")
            return _coefficient(get_total_norm(norms), limit)  # as clip_grad_norm_ does with the norms of gradients


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _coefficient(norm: Tensor, limit: float) -> Tensor:
    return torch.clamp(limit / (_whole(norm) + _EPSILON), max=1.0)


def _scale(p: Tensor, coefficient: Tensor) -> None:
    assert p.grad is not None
    local_part(p.grad).mul_(coefficient.to(p.grad.device))


def _clamp(p: Tensor, limit: float) -> None:
    assert p.grad is not None
    local_part(p.grad).clamp_(-limit, limit)
