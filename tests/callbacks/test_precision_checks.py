"""Precision pitfalls stop a run, or are said, before its first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.plugins import MixedPrecision

from lightning_memsave import BF16Precision, EarlyZeroGrad, LowMemoryOptimizer
from lightning_memsave.errors import ConfigurationError


def scaled() -> MixedPrecision:
    """What ``precision="16-mixed"`` is on an accelerator."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))


def fit(module: Any, *callbacks: Any, **options: Any) -> Any:
    trainer = make_trainer(callbacks=[*callbacks], **options)
    trainer.fit(module, make_loader())
    return trainer


SAVERS = [lambda: [EarlyZeroGrad()], lambda: [LowMemoryOptimizer()], lambda: [LowMemoryOptimizer(), EarlyZeroGrad()]]


@pytest.mark.parametrize("savers", SAVERS)
def test_fp16_trainables_with_loss_scaling_stop_at_setup(savers) -> None:
    module = LitLM()
    module.net.blocks[1].half()
    with pytest.raises(
        ConfigurationError, match=r"precision='16-mixed'.*12 trainable parameters are fp16: net.blocks.1"
    ):
        fit(module, *savers(), plugins=[scaled()])
    assert module.losses == []


def test_frozen_fp16_weights_are_fine_and_loss_scaling_trains() -> None:
    module = LitLM()
    frozen = torch.nn.Linear(4, 4).half().requires_grad_(False)
    module.frozen = frozen
    trainer = fit(module, LowMemoryOptimizer(), EarlyZeroGrad(), plugins=[scaled()], max_epochs=3)
    assert module.losses[-1] < module.losses[0]
    assert trainer.global_step == 9


class Fused(LitLM):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer._step_supports_amp_scaling = True  # what fused=True sets on a CUDA device
        return optimizer


def test_a_fused_optimizer_with_clipping_stops_and_a_swapped_one_does_not() -> None:
    with pytest.raises(ConfigurationError, match=r"fused optimizer \(AdamW\).*fused=False"):
        fit(Fused(), EarlyZeroGrad(), plugins=[scaled()], gradient_clip_val=1.0)
    fit(Fused(), LowMemoryOptimizer(), EarlyZeroGrad(), plugins=[scaled()], gradient_clip_val=1.0)


@pytest.mark.parametrize("savers", SAVERS)
def test_steps_too_small_for_bf16_are_said_once(savers) -> None:
    with pytest.warns(
        UserWarning, match=r"precision='bf16-true'.*leaves \d+% of the 16-bit weights unchanged"
    ) as caught:
        fit(LitLM(lr=1e-6), *savers(), precision="bf16-true")
    assert len([w for w in caught if "unchanged" in str(w.message)]) == 1


def test_an_eps_of_zero_in_fp16_is_said() -> None:
    class Half(LitLM):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)

    with pytest.warns(UserWarning, match=r"precision='16-true'.*eps=1e-08 underflows to 0.*eps>=1e-6"):
        fit(Half(), EarlyZeroGrad(), precision="16-true")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_sound_run_says_nothing(precision) -> None:
    fit(LitLM(lr=1e-2), EarlyZeroGrad(), LowMemoryOptimizer(), precision=precision)  # warnings are errors here


@pytest.mark.parametrize("weights", ["stochastic", "split", "kahan"])
def test_weights_that_keep_what_is_rounded_away_are_not_warned_of(weights, recwarn) -> None:
    module = LitLM(lr=1e-6)
    fit(module, EarlyZeroGrad(), plugins=[BF16Precision(weights)])
    assert not [w for w in recwarn if "unchanged" in str(w.message)]


def test_an_optimizer_that_keeps_what_is_rounded_away_is_not_warned_of(recwarn) -> None:
    fit(LitLM(lr=1e-6), EarlyZeroGrad(), LowMemoryOptimizer("adamw_split_master"), precision="bf16-true")
    assert not [w for w in recwarn if "unchanged" in str(w.message)]
