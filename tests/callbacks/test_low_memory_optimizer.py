"""The optimizer of an unmodified module is replaced in a real run."""

from __future__ import annotations

import re
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning  # noqa: TID251  (both namespaces are under test)
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from lightning_memsave import EarlyZeroGrad, GradientRelease, LowMemoryOptimizer, OptimizerOffload
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError, MissingDependencyError
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.state_bytes import held_state_bytes
from lightning_memsave.units import format_bytes

BF16_WEIGHTS = "adamw_split_master"  # its runs are in tests/precision
NAMES = [name for name in OPTIMIZERS if name != BF16_WEIGHTS]
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]


class Rates(pl.Callback, pytorch_lightning.Callback):
    """Note the learning rates after every step, and the lines the session kept."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.lines: list[str] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rates.append([group["lr"] for o in trainer.optimizers for group in o.param_groups])

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        session = Session.find(trainer)
        self.lines = [f"{name}: {line}" for name, line in session.lines] if session else []


def fit(module: Any, *callbacks: Any, ckpt_path: str | None = None, loader: Any = None, **trainer_options: Any) -> Any:
    trainer = make_trainer(callbacks=[*callbacks], **trainer_options)
    trainer.fit(module, loader or make_loader(), ckpt_path=ckpt_path)
    return trainer


# -- what it does ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_reported_bytes_are_the_bytes_held(name, precision) -> None:
    seen = Rates()
    trainer = fit(LitLM(), LowMemoryOptimizer(name), EarlyZeroGrad(), seen, precision=precision)
    [optimizer] = trainer.optimizers
    assert type(optimizer).__name__ == OPTIMIZERS[name].title
    plain = fit(LitLM(), precision=precision)
    before, after = held_state_bytes(plain.optimizers[0]), held_state_bytes(optimizer)
    [line] = [line for line in seen.lines if line.startswith("LowMemoryOptimizer")]
    assert f"AdamW -> {OPTIMIZERS[name].title}, state {format_bytes(before)} -> {format_bytes(after)}" in line


@pytest.mark.parametrize("precision", PRECISIONS)
def test_eight_bits_follow_adamw(precision) -> None:
    losses = {}
    for callbacks in ((), (LowMemoryOptimizer(),)):
        module = LitLM()
        fit(module, *callbacks, precision=precision, max_epochs=3)
        losses[callbacks] = module.losses
    plain, narrow = losses.values()
    # 9 steps; worst seen: 4e-4 in fp32, 3e-2 in bf16-true, whose losses have 8 bits themselves
    assert plain == pytest.approx(narrow, abs=0.07 if precision == "bf16-true" else 5e-3)
    assert narrow[-1] < narrow[0]


def test_fp16_autocast_falls_back_on_the_cpu_and_still_trains() -> None:
    module = LitLM()
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        trainer = fit(module, LowMemoryOptimizer(), EarlyZeroGrad(), precision="16-mixed")
    assert type(trainer.optimizers[0]).__name__ == "AdamW8bit"


class Scheduled(LitLM):
    """Two groups and a nested scheduler with a dict configuration, as real projects write it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net.blocks.parameters(), "lr": 1e-3, "name": "blocks"},
            {
                "params": [*self.net.embedding.parameters(), *self.net.norm.parameters()],
                "lr": 5e-4,
                "weight_decay": 0.0,
            },
            {"params": self.net.head.parameters(), "lr": 2e-3},
        ]
        optimizer = torch.optim.AdamW(groups)
        scheduler = {
            "lambda": lambda: LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4)),
            "one_cycle": lambda: OneCycleLR(optimizer, [1e-3, 5e-4, 2e-3], total_steps=12),
            "sequential": lambda: SequentialLR(
                optimizer, [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 10)], [3]
            ),
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
        }[self.kind]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "loss"}}


@pytest.mark.parametrize("kind", ["lambda", "one_cycle", "sequential", "plateau"])
@pytest.mark.parametrize("name", NAMES)
def test_resume_at_an_epoch_boundary_is_bit_exact_with_every_scheduler(name, kind, tmp_path) -> None:
    plain = Rates()
    fit(Scheduled(kind), plain, max_epochs=2)
    whole, rates = Scheduled(kind), Rates()
    fit(whole, LowMemoryOptimizer(name), rates, max_epochs=2)
    assert len(rates.rates) == 6
    if kind != "plateau":  # which follows the losses
        assert rates.rates == plain.rates
    path = str(tmp_path / "epoch.ckpt")
    fit(Scheduled(kind), LowMemoryOptimizer(name)).save_checkpoint(path)
    torch.load(path, weights_only=True)
    resumed, later = Scheduled(kind), Rates()
    fit(resumed, LowMemoryOptimizer(name), later, max_epochs=2, ckpt_path=path)
    assert later.rates == rates.rates[3:]
    assert resumed.losses == whole.losses[3:]
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )


RANKS = {"galore_adamw": {"rank": 16}, "apollo_adamw": {"rank": 16}}  # below the width of the model


@pytest.mark.parametrize("saver", [GradientRelease, OptimizerOffload])
@pytest.mark.parametrize("name", NAMES)
def test_stepping_inside_backward_or_on_the_host_gives_the_same_bits(name, saver) -> None:
    plain, saved = LitLM(), LitLM()
    optimizer = LowMemoryOptimizer(name, options=RANKS.get(name))
    fit(plain, optimizer, max_epochs=2)
    fit(saved, optimizer, saver(), max_epochs=2)
    assert saved.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), saved.state_dict().values(), strict=True))


def test_a_checkpoint_of_the_plain_run_is_refused_with_the_way_out(tmp_path) -> None:
    trainer = fit(LitLM())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointMismatchError, match=r"'exp_avg'.* AdamW8bit needs .*load_from_checkpoint"):
        fit(LitLM(), LowMemoryOptimizer(), max_epochs=2, ckpt_path=str(tmp_path / "plain.ckpt"))


def tabular(namespace: Any) -> Any:
    class Tabular(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(F.one_hot(batch, 64).float()).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Tabular()


@pytest.mark.parametrize("namespace", [pl, pytorch_lightning])
def test_both_namespaces_accumulation_and_clipping(namespace) -> None:
    trainer = make_trainer(
        namespace, callbacks=[LowMemoryOptimizer()], accumulate_grad_batches=2, gradient_clip_val=0.5, max_epochs=2
    )
    trainer.fit(tabular(namespace), make_loader())
    assert trainer.global_step == 4  # the last window of an epoch is short
    assert {state["step"] for state in trainer.optimizers[0].state.values()} == {4}


# -- manual optimization -----------------------------------------------------------------------------------------------
class Gan(pl.LightningModule):
    """Two optimizers, toggled, and two steps of the first in one training step; one is also kept on ``self``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(64, 64), nn.Linear(64, 64)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        x = F.one_hot(batch, 64).float()
        for _ in range(2):
            self.toggle_optimizer(critic)
            self.manual_backward(self.critic(self.generator(x).detach()).square().mean())
            critic.step()
            critic.zero_grad()
            self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        self.manual_backward((self.critic(self.generator(x)) - 1).square().mean())
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self) -> Any:
        self.own = torch.optim.Adam(self.critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
        generator = torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.0, 0.9))
        return [self.own, generator], [LambdaLR(o, lambda step: 0.5**step) for o in (self.own, generator)]


def test_a_gan_keeps_two_optimizers_and_counts_each_step() -> None:
    module = Gan()
    trainer = fit(module, LowMemoryOptimizer("adamw_8bit"))
    critic, generator = trainer.optimizers
    assert [type(o).__name__ for o in (critic, generator)] == ["AdamW8bit"] * 2
    assert module.own is critic
    assert [o.param_groups[0]["betas"] for o in (critic, generator)] == [(0.5, 0.9), (0.0, 0.9)]
    assert [o.param_groups[0]["lr"] for o in (critic, generator)] == [1e-3 * 0.5**3, 2e-3 * 0.5**3]
    assert critic.state[module.critic.weight]["step"] == 6
    assert generator.state[module.generator.weight]["step"] == 3
    assert trainer.global_step == 9


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.blocks)
        self.freeze(pl_module.net.embedding)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.net.blocks, pl_module.net.embedding], optimizer, lr=1e-4)


def test_an_encoder_unfrozen_later_trains_with_the_same_widths() -> None:
    module = LitLM(vocabulary=128)
    start = module.net.blocks[0].up.weight.detach().clone()
    trainer = fit(module, LowMemoryOptimizer(), Unfreeze(), max_epochs=3, loader=make_loader())
    state = trainer.optimizers[0].state
    assert not torch.equal(start, module.net.blocks[0].up.weight)
    assert state[module.net.blocks[0].up.weight]["state1"].dtype == torch.uint8
    assert state[module.net.embedding.weight]["state1"].dtype == torch.float32


# -- life --------------------------------------------------------------------------------------------------------------
def test_nothing_stays_on_the_module_and_a_second_fit_swaps_again() -> None:
    module, callback = LitLM(), LowMemoryOptimizer()
    for _ in range(2):
        trainer = fit(module, callback)
        assert type(trainer.optimizers[0]).__name__ == "AdamW8bit"
        assert "configure_optimizers" not in module.__dict__
    fit(module)
    assert type(module.trainer.optimizers[0]) is torch.optim.AdamW


def test_validation_alone_swaps_nothing() -> None:
    module = LitLM()
    trainer = make_trainer(callbacks=[LowMemoryOptimizer()])
    trainer.validate(module, make_loader(), verbose=False)
    assert "configure_optimizers" not in module.__dict__


# -- misuse ------------------------------------------------------------------------------------------------------------
def test_an_unknown_name_gives_the_near_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"name='adamw8bit' is not .* Nearest: .*'adamw_8bit'"):
        LowMemoryOptimizer("adamw8bit")


def test_all_wrong_options_are_listed() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)LowMemoryOptimizer:\n.*'lr'.*\n.*'min_8bit_size'"):
        LowMemoryOptimizer("lion", options={"lr": 1e-3, "min_8bit_size": 1})


def test_wrong_values_are_found_at_construction() -> None:
    with pytest.raises(ConfigurationError, match=r"options=\{'betas': 0.9\}: adamw_8bit takes two numbers"):
        LowMemoryOptimizer(options={"betas": 0.9})
    with pytest.raises(ConfigurationError, match="keep_32bit=3"):
        LowMemoryOptimizer(keep_32bit=3)


def test_asking_twice_is_refused() -> None:
    callbacks = [LowMemoryOptimizer(), LowMemoryOptimizer("lion")]
    with pytest.raises(ConfigurationError, match=r"asked for twice, LowMemoryOptimizer\(\) and .*'lion'"):
        fit(LitLM(), *callbacks)


def test_a_missing_library_gives_the_pip_line(monkeypatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install "lightning-memsave[bnb]"')):
        fit(LitLM(), LowMemoryOptimizer())
    fit(LitLM(), LowMemoryOptimizer("adafactor"))


class LineSearch(LitLM):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class NoOptimizer(LitLM):
    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("module", "message"),
    [(LineSearch, "LBFGS cannot be replaced"), (NoOptimizer, "configure_optimizers returned NoneType")],
)
def test_what_cannot_be_swapped_stops_before_the_first_step(module, message) -> None:
    module = module()
    with pytest.raises(ConfigurationError, match=message):
        fit(module, LowMemoryOptimizer())
    assert module.losses == []
    assert "configure_optimizers" not in module.__dict__


def test_yaml_lists_are_taken_for_betas() -> None:
    trainer = fit(LitLM(), LowMemoryOptimizer(options={"betas": [0.9, 0.95]}))
    assert tuple(trainer.optimizers[0].param_groups[0]["betas"]) == (0.9, 0.95)
