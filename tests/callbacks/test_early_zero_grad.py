"""Gradients are gone during the next forward, and nothing else changes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from live_bytes import LiveBytes

from lightning_memsave import EarlyZeroGrad
from lightning_memsave.callbacks._session import Session
from lightning_memsave.optim.zero_grad import gradient_bytes


class Watched(LitLM):
    """Notes the gradient bytes that are alive when a forward begins."""

    def __init__(self, **network: Any) -> None:
        super().__init__(**network)
        self.alive: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        self.alive.append(gradient_bytes(self.trainer.optimizers))
        return super().training_step(batch, batch_idx)


class Lines(pl.Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        session = Session.find(trainer)
        self.lines = [line for name, line in session.lines if name == "EarlyZeroGrad"] if session else []


def fit(module: Any, *callbacks: Any, **options: Any) -> Any:
    lines = Lines()
    trainer = make_trainer(callbacks=[*callbacks, lines], **options)
    trainer.fit(module, make_loader(batch_size=4))  # six batches an epoch
    return lines.lines


def both(build: Any, **options: Any) -> tuple[Any, Any, list[str]]:
    """Train twice, without and with; return both modules and the lines."""
    plain, early = build(), build()
    fit(plain, **options)
    lines = fit(early, EarlyZeroGrad(), **options)
    assert early.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(early.state_dict().values(), plain.state_dict().values(), strict=True))
    return plain, early, lines


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_no_gradient_is_alive_in_a_forward(precision) -> None:
    plain, early, lines = both(Watched, precision=precision, max_epochs=2)
    whole = sum(p.nbytes for p in plain.parameters())
    assert plain.alive == [0, *[whole] * 11]
    assert early.alive == [0] * 12
    assert lines[0].startswith("free 421.00 KiB" if precision != "bf16-true" else "free 210.50 KiB")


def test_accumulated_gradients_stay_until_their_window_ends() -> None:
    plain, early, _ = both(Watched, accumulate_grad_batches=4, max_epochs=2)
    whole = sum(p.nbytes for p in plain.parameters())
    # windows of 4 and 2 batches: the epoch's last batch steps as well
    assert early.alive == [0, whole, whole, whole, 0, whole] * 2
    assert plain.alive[6:] == [whole] * 6


def test_the_peak_falls() -> None:
    peaks = {}
    for callbacks in ((), (EarlyZeroGrad(),)):
        module = LitLM(width=128)
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.1, foreach=False)
        live = LiveBytes(*(p.data for p in module.parameters()))

        class FromSecond(pl.Callback):
            def on_train_batch_start(self, *_: Any, live: LiveBytes = live) -> None:
                live.peak = live.current

        trainer = make_trainer(callbacks=[*callbacks, FromSecond()], max_steps=3)
        with live:
            trainer.fit(module, make_loader(batch_size=6))
        peaks[len(callbacks)] = live.peak
    # activations about as large as the 1.6 MiB of gradients; seen: -25 %
    assert peaks[1] < 0.8 * peaks[0]


# -- what it respects --------------------------------------------------------------------------------------------------
class ZerosInstead(Watched):
    """Leaves zeros, so that AdamW also moves and decays what got no gradient in a step."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def loss(self, batch: Any) -> Any:
        loss = super().loss(batch)
        return loss if len(self.losses) % 2 else loss.detach() + self.net.head.weight.square().sum()


class NoneByHand(Watched):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)


def test_a_module_that_wants_zeros_keeps_them() -> None:
    plain, early, lines = both(ZerosInstead)
    assert early.alive == plain.alive
    assert lines[-1] == "inactive: the module's optimizer_zero_grad keeps gradient tensors"


def test_a_module_that_sets_none_itself_is_helped_after_the_first_step() -> None:
    plain, early, lines = both(NoneByHand)
    assert plain.alive[1] > 0
    assert early.alive == [0, plain.alive[1], 0, 0, 0, 0]
    assert "if the module's own optimizer_zero_grad sets them to None" in lines[0]


class EverySecond(Watched):
    """Accumulates on its own: steps and zeroes at every second batch."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


def test_a_step_that_the_module_left_out_keeps_the_gradients() -> None:
    plain, early, _ = both(EverySecond)
    whole = plain.alive[1]
    assert plain.alive == [0, *[whole] * 5]
    assert early.alive == [0, whole, whole, whole, 0, whole]


class Manual(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.alive.append(gradient_bytes(self.trainer.optimizers))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        optimizer.step()


def test_manual_optimization_is_left_alone_with_advice() -> None:
    plain, early, lines = both(Manual)
    assert early.alive == plain.alive
    assert lines == [
        "inactive: the module optimizes manually; "
        "call optimizer.zero_grad(set_to_none=True) right after optimizer.step()"
    ]


def test_deepspeed_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(Session, "strategy_kind", "deepspeed")
    plain, early = Watched(), Watched()
    fit(plain)
    lines = fit(early, EarlyZeroGrad())
    assert early.alive == plain.alive
    assert lines[-1:] == ["inactive: DeepSpeed frees its gradients itself"]


class Reader(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(pl_module.net.head.weight.grad is not None)


def test_a_callback_before_it_in_the_list_still_reads_gradients() -> None:
    before, after = Reader(), Reader()
    fit(Watched(), before, EarlyZeroGrad(), after)
    assert before.seen == [True] * 6
    assert after.seen == [False] * 6


def test_parameters_outside_the_optimizer_keep_their_gradients() -> None:
    class Half(Watched):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.blocks.parameters(), lr=self.lr)

    _, early, _ = both(Half)
    assert early.net.head.weight.grad is not None
    assert early.net.blocks[0].up.weight.grad is None


def test_nothing_is_left_on_the_optimizer() -> None:
    trainer = make_trainer(callbacks=[EarlyZeroGrad()])
    trainer.fit(Watched(), make_loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_a_scaler_that_skips_a_step_does_not_lose_it() -> None:
    class Scaler(torch.amp.GradScaler):
        """Finds infinities in the second step."""

        count = 0

        def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return None if self.count == 2 else super().step(optimizer, *args, **kwargs)

    def run(*callbacks: Any) -> Any:
        from lightning.pytorch.plugins import MixedPrecision

        module = Watched()
        plugin = MixedPrecision("16-mixed", "cpu", scaler=Scaler("cpu", init_scale=2.0**4))
        fit(module, *callbacks, plugins=[plugin])
        return module

    plain, early = run(), run(EarlyZeroGrad())
    assert early.losses == plain.losses
    assert early.alive == [0, 0, plain.alive[1], 0, 0, 0]
