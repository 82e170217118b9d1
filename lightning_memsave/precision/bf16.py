"""Train bf16 weights without losing the small updates."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_memsave._match import as_patterns
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.optim.split_weights import CORRECTIONS
from lightning_memsave.planner.compatibility import check_methods
from lightning_memsave.precision._base import PrecisionPlugin, end_session
from lightning_memsave.precision._bf16_run import BF16Run

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["BF16Precision"]

_NAME = "BF16Precision"
_WAYS = ("stochastic", "split", "kahan")
Weights = Literal["stochastic", "split", "kahan"]


class BF16Precision(PrecisionPlugin):
    """Train bf16 weights as fp32 weights are trained: no small update is lost.

    With ``precision="bf16-true"`` an update below half a bf16 spacing (0.2 % of the weight) is rounded away. Here the
    optimizer of ``configure_optimizers`` steps fp32 copies of a few parameters at a time, with fp32 state, and what
    bf16 cannot hold of the result is rounded by chance (``"stochastic"``), kept as an 8-bit correction (``"split"``) or
    kept as a bf16 compensation (``"kahan"``). The optimizer, its groups and its schedulers stay the module's own.

    **Saves** against fp32, of 4 bytes a weight and 4 a gradient: 2 and 2 (``stochastic``), 1 and 2 (``split``), 0 and 2
    (``kahan``); and half of the activations. ``LowMemoryOptimizer("adamw_split_master")`` beside ``"split"`` brings
    weights, masters and both moments to ``5 + 8 / 256`` bytes.
    **Costs** two fp32 copies of one bucket of parameters in the step (of the largest one, where the optimizer is not
    one of torch's element-wise ones), and their conversion.
    **Numerics** are statistical: forward and backward are bf16. Masters are right on average (``stochastic``), to
    1.5e-5 (``split``; ``correction="int16"``: 1.2e-7) or 7.6e-6 (``kahan``). Gradients accumulate in bf16.
    **Does not combine with** FSDP and DeepSpeed, LBFGS, schedule-free and Prodigy-like optimizers, and
    ``adamw_split_master`` unless ``"split"``.

    Args:
        weights: ``stochastic``, ``split`` or ``kahan``.
        keep_fp32: Modules that stay fp32: ``"*norm*"`` (every normalization layer, whatever its name), globs or class
            names. They take fp32 and return bf16. Routers of a mixture of experts and rotary tables are kept in any
            case, adapters of LoRA and quantized weights stay as they are.
        correction: ``int8`` or ``int16`` (one byte more), for ``split``.
        checkpoint_dtype: ``"float32"`` writes the joined weights into checkpoints (``split`` and ``kahan``); by default
            they hold the bf16 weights, and the optimizer's state the rest.

    Raises:
        ConfigurationError: For a wrong argument; at ``fit``, for an optimizer or a strategy it cannot work with.
        NothingToTransformError: At ``fit``, if a pattern of ``keep_fp32`` (other than ``"*norm*"``) matches no module.
        CheckpointMismatchError: At ``fit``, if the checkpoint was written with another ``weights`` or ``correction``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_memsave import BF16Precision
        >>> trainer = Trainer(accelerator="cpu", plugins=[BF16Precision("split")], logger=False)
        >>> trainer.precision
        'bf16-true'

    Source:
        Stochastic rounding and Kahan summation in bf16: Zamirai et al. 2020, https://arxiv.org/abs/2010.06192.
        Split weights: FlashOptim 2026, https://arxiv.org/abs/2602.23349.

    """

    precision: Any = "bf16-true"

    def __init__(
        self,
        weights: Weights = "stochastic",
        *,
        keep_fp32: Sequence[str] = ("*norm*",),
        correction: Literal["int8", "int16"] = "int8",
        checkpoint_dtype: Literal["float32"] | None = None,
    ) -> None:
        raise_problems(_NAME, list(_problems(weights, keep_fp32, correction, checkpoint_dtype)))
        self.weights = weights
        self.keep_fp32 = keep_fp32
        self.correction = correction
        self.checkpoint_dtype = checkpoint_dtype
        self._run: BF16Run | None = None
        self._loaded: dict[str, Any] = {}

    # -- the model ----------------------------------------------------------------------------------------------------
    def convert_module(self, module: Any) -> Any:
        """Cast the model, keeping what the cast would lose."""
        session = Session.of(module.trainer)
        check_methods([*session.methods, _NAME], session.strategy_kind)
        if self._run is not None:
            self._run.close()
        self._run = BF16Run(self.weights, CORRECTIONS[self.correction])
        self._run.load_state_dict(self._loaded)
        session.report(
            _NAME, self._run.cast(module, as_patterns(self.keep_fp32, subject=_NAME) if self.keep_fp32 else ())
        )
        return module

    def connect(self, model: Any, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        """Let the optimizers step through fp32 copies."""
        if self._run is None:
            raise ConfigurationError(
                f"{_NAME}: this strategy does not cast the model. Use one device, or strategy='ddp'."
            )
        line = self._run.connect(optimizers)
        trainer = self._run.module.trainer
        if line:
            Session.of(trainer).report(_NAME, line)
        if self.checkpoint_dtype is not None:
            self._run.write_joined(trainer.strategy)
        return model, optimizers, lr_schedulers

    # -- inputs and the forward ---------------------------------------------------------------------------------------
    def convert_input(self, data: Any) -> Any:
        """Cast floating tensors of a batch to bf16."""
        return apply_to_collection(data, Tensor, lambda t: t.to(torch.bfloat16) if torch.is_floating_point(t) else t)

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Create floating tensors in bf16 inside a step, as ``precision="bf16-true"`` does."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the random numbers that round."""
        return self._loaded if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the random numbers of a checkpoint."""
        self._loaded = dict(state_dict)
        if self._run is not None:
            self._run.load_state_dict(state_dict)

    def teardown(self) -> None:
        """Give the optimizers back."""
        if self._run is not None:
            self._loaded = self._run.state_dict()
            self._run.close()
            end_session(self._run.module)


def _problems(weights: object, keep_fp32: object, correction: object, checkpoint_dtype: object) -> Iterable[str]:
    if weights not in _WAYS:
        yield f"weights={weights!r}. Write {', '.join(map(repr, _WAYS[:-1]))} or {_WAYS[-1]!r}."
    patterns = [keep_fp32] if isinstance(keep_fp32, str) else keep_fp32
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
        yield f'keep_fp32={keep_fp32!r} selects no modules. Write globs or class names, e.g. ["*norm*", "*.head"].'
    if correction not in CORRECTIONS:
        yield f'correction={correction!r}. Write "int8" or "int16".'
    elif correction != "int8" and weights != "split":
        yield f'correction={correction!r} goes with weights="split"; found weights={weights!r}.'
    if checkpoint_dtype not in (None, "float32"):
        yield f'checkpoint_dtype={checkpoint_dtype!r}. Write "float32" for joined weights, or leave it out.'
    elif checkpoint_dtype is not None and weights == "stochastic":
        yield 'checkpoint_dtype="float32": stochastic weights are bf16 and nothing more. Leave it out.'
