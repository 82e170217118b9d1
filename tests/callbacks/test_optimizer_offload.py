"""Optimizer state on the host, on disk, or there between phases, in real runs of unmodified modules."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning  # noqa: TID251  (both namespaces are under test)
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from offload_helpers import FakeBoundary, fake_device
from packaging.version import Version
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

from lightning_memsave import (
    CheckpointRehearsal,
    EarlyZeroGrad,
    GradientRelease,
    IncompatibleMethodsError,
    LowMemoryOptimizer,
    MemoryAudit,
    OptimizerOffload,
)
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.optim import offload as offload_module
from lightning_memsave.optim._offload_step import MASTER
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.state_bytes import held_state_bytes
from lightning_memsave.units import format_bytes


class Lines(pl.Callback, pytorch_lightning.Callback):
    """Keep what was reported, and the learning rates."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.lines: list[str] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rates.append([group["lr"] for o in trainer.optimizers for group in o.param_groups])

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        session = Session.find(trainer)
        self.lines = [line for name, line in session.lines if name == "OptimizerOffload"] if session else []


class Scheduled(LitLM):
    """Two groups and a nested scheduler."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net.blocks.parameters(), "name": "blocks"},
            {"params": [*self.net.embedding.parameters(), *self.net.norm.parameters()], "lr": 5e-4},
            {"params": self.net.head.parameters(), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        scheduler = SequentialLR(
            optimizer, [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 9)], [3]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(
    module: Any, *callbacks: Any, ckpt_path: Any = None, namespace: Any = pl, val: Any = None, **options: Any
) -> Any:
    trainer = make_trainer(namespace, callbacks=[*callbacks], **options)
    trainer.fit(module, make_loader(), val, ckpt_path=ckpt_path)
    return trainer


def weights(module: Any) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def state_of(trainer: Any) -> list[Tensor]:
    return [v for o in trainer.optimizers for v in values(o.state_dict())]


def values(state_dict: Any) -> list[Tensor]:
    """Return what an optimizer's state dict holds, in the order of the parameters."""

    def flat(value: Any) -> list[Tensor]:
        if isinstance(value, dict):
            return [leaf for key in sorted(value) for leaf in flat(value[key])]
        return [torch.as_tensor(value)]

    return flat(state_dict["state"])


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


WAYS: dict[str, dict[str, Any]] = {
    "files": {"device": "state"},
    "host": {"device": "cpu"},
    "gradients": {"device": "cpu", "gradients": True},
    "host files": {"device": "state"},
}
# "files" trains on the host itself; the others see their parameters on a device


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if request.param != "files":
        fake_device(monkeypatch)
    return WAYS[request.param]


# -- ordinary training -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_losses_weights_state_and_rates_are_those_of_ordinary_training(way: Any, options: Any) -> None:
    plain, rates = Scheduled(dropout=0.1), Lines()
    torch.manual_seed(7)
    ordinary = fit(plain, rates, max_epochs=2, **options)
    module, seen = Scheduled(dropout=0.1), Lines()
    torch.manual_seed(7)
    trainer = fit(module, OptimizerOffload(**way), seen, max_epochs=2, **options)
    assert module.losses == plain.losses
    assert equal(weights(module), weights(plain))
    assert equal(state_of(trainer), state_of(ordinary))
    assert seen.rates == rates.rates
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert not {"step", "load_state_dict"} & {
        k for k, v in trainer.optimizers[0].__dict__.items() if not hasattr(v, "_wrapped_by_lr_sched")
    }


def test_a_checkpoint_is_an_ordinary_one_and_resumes_either_way(way: Any, tmp_path: Path) -> None:
    whole = Scheduled()
    fit(whole, max_epochs=2)
    for first, second in (([OptimizerOffload(**way)], []), ([], [OptimizerOffload(**way)])):
        path = tmp_path / f"{len(first)}.ckpt"
        fit(Scheduled(), *first).save_checkpoint(path)
        torch.load(path, weights_only=True)
        resumed = Scheduled()
        fit(resumed, *second, max_epochs=2, ckpt_path=path)
        assert resumed.losses == whole.losses[3:]
        assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_4bit", "adafactor", "came", "muon", "galore_adamw"])
@pytest.mark.parametrize("keep_32bit", [["*norm*"], ["net.head"]], ids=["", "head"])
def test_an_optimizer_of_another_rule_resumes_from_files_and_in_memory(
    name: str, keep_32bit: list[str], tmp_path: Path
) -> None:
    def savers(offload: bool = True) -> list[Any]:
        options = {"rank": 8} if name == "galore_adamw" else {}
        replaced = LowMemoryOptimizer(name, options=options, keep_32bit=keep_32bit)
        return [replaced, *([OptimizerOffload("state"), CheckpointRehearsal()] if offload else [])]

    whole = Scheduled()
    fit(whole, *savers(), max_epochs=2, enable_checkpointing=True)
    path = tmp_path / "files.ckpt"
    fit(Scheduled(), *savers()).save_checkpoint(path)
    for offload in (True, False):
        resumed = Scheduled()
        fit(resumed, *savers(offload), max_epochs=2, ckpt_path=path)
        assert resumed.losses == whole.losses[3:]
        assert equal(weights(resumed), weights(whole))


def test_saving_after_the_fit_and_a_second_fit_work(way: Any, tmp_path: Path) -> None:
    callback, module = OptimizerOffload(**way), LitLM()
    trainer = fit(module, callback)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    plain = fit(LitLM())
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert equal(values(saved["optimizer_states"][0]), state_of(plain))
    fit(module, callback)
    again = fit(module)
    assert "step" not in again.optimizers[0].__dict__
    assert list(Path("state").glob("*")) == []


@pytest.mark.parametrize("namespace", [pl, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_both_namespaces_log_learning_rates(namespace: Any, tmp_path: Path) -> None:
    if namespace is pl:
        monitor: Any = LearningRateMonitor("step")
        module: Any = Scheduled()
        logger: Any = CSVLogger(tmp_path)
    else:
        from pytorch_lightning.loggers import CSVLogger as OtherLogger  # noqa: TID251

        monitor, module = pytorch_lightning.callbacks.LearningRateMonitor("step"), PytorchLM()
        logger = OtherLogger(tmp_path)
    options = {"namespace": namespace, "logger": logger, "log_every_n_steps": 1}
    trainer = fit(module, OptimizerOffload("state"), monitor, **options)
    assert len(monitor.lrs) == len(trainer.optimizers[0].param_groups)
    assert len(trainer.optimizers[0].state) > 0


class PytorchLM(pytorch_lightning.LightningModule):
    """The smallest module of the other namespace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(64, 64)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.table(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [OneCycleLR(optimizer, 1e-2, total_steps=9)]


class Gan(pl.LightningModule):
    """Two optimizers, toggled, under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.critic = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        x = torch.nn.functional.one_hot(batch, 64).float()
        for optimizer, loss in zip(self.optimizers(), (self._critic_loss, self._generator_loss)):
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss(x))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def _critic_loss(self, x: Tensor) -> Tensor:
        return self.critic(self.generator(x).detach()).square().mean()

    def _generator_loss(self, x: Tensor) -> Tensor:
        return (self.critic(self.generator(x)) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.9)) for m in (self.critic, self.generator)]


def test_a_gan_trains_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Gan()
    fit(plain, max_epochs=2)
    for fake in (False, True):
        if fake:
            fake_device(monkeypatch)
        module = Gan()
        fit(module, OptimizerOffload("state"), max_epochs=2)
        assert equal(weights(module), weights(plain))


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.blocks, optimizer, lr=1e-4)


def test_frozen_parameters_are_skipped_until_they_are_unfrozen(way: Any) -> None:
    plain, module, seen = LitLM(), LitLM(), Lines()
    fit(plain, Unfreeze(), max_epochs=3)
    trainer = fit(module, Unfreeze(), OptimizerOffload(**way), seen, max_epochs=3)
    assert module.losses == plain.losses
    assert len(trainer.optimizers[0].state) == len(list(module.parameters()))
    trained = [p for name, p in module.named_parameters() if "blocks" not in name]
    assert f"{format_bytes(sum(2 * p.nbytes + 4 for p in trained))} of state" in seen.lines[0]


def test_parameters_are_stepped_in_backward_only_where_nothing_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)

    class Reads(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            assert all(p.grad is None for p in module.parameters())

    for callbacks, options, where in (
        ([], {}, "inside of backward"),
        ([EarlyZeroGrad()], {"accumulate_grad_batches": 2}, "inside of backward"),
        ([], {"gradient_clip_val": 1.0}, "after backward"),
        ([Reads()], {}, "after backward"),
    ):
        seen = Lines()
        fit(LitLM(), OptimizerOffload(gradients=True), *callbacks, seen, **options)
        assert f"parameters are stepped {where}" in seen.lines[-1]
    fit(LitLM(), OptimizerOffload(gradients=True), Reads(), seen)
    assert "no gradients are seen by Reads.on_before_optimizer_step" in seen.lines[1]


def test_gradients_are_not_on_the_device_between_the_batches_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)
    held: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            held.append(sum(p.grad.nbytes for p in module.parameters() if p.grad is not None))

    fit(LitLM(), OptimizerOffload(gradients=True), Look(), accumulate_grad_batches=3)
    assert held == [0, 0, 0]


@pytest.mark.parametrize("gradients", [False, True])
def test_master_weights_train_a_bf16_module_in_fp32_on_the_cpu_too(gradients: bool, tmp_path: Path) -> None:
    module, seen = LitLM(), Lines()
    callback = OptimizerOffload(master_weights=True, gradients=gradients)
    trainer = fit(module, callback, seen, precision="bf16-true", max_epochs=2)
    for p, state in trainer.optimizers[0].state.items():
        assert (p.dtype, state[MASTER].dtype, state["exp_avg"].dtype) == (torch.bfloat16, torch.float32, torch.float32)
        assert torch.equal(p, state[MASTER].bfloat16())
    half = fit(LitLM(), OptimizerOffload(master_weights=True), precision="bf16-true")
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = LitLM()
    fit(resumed, callback, precision="bf16-true", max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.losses == module.losses[3:]
    fp32 = LitLM()
    fit(fp32, max_epochs=2)
    # worst seen: 0.012 (activations have 8 bits)
    assert module.losses == pytest.approx(fp32.losses, abs=0.05)


BF16_ONLY = ("adamw_split_master",)


# -- together with other methods ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if not row.paged and n not in BF16_ONLY])
def test_small_state_optimizers_keep_their_widths_on_the_host(name: str, order: int, monkeypatch, tmp_path) -> None:
    plain = LitLM(vocabulary=128)
    ordinary = fit(plain, LowMemoryOptimizer(name))
    for device in ("state", "cpu"):
        if device == "cpu":
            fake_device(monkeypatch)
        module = LitLM(vocabulary=128)
        callbacks = [LowMemoryOptimizer(name), OptimizerOffload(device)][::order]
        trainer = fit(module, *callbacks)
        assert module.losses == plain.losses
        assert equal(state_of(trainer), state_of(ordinary))
        assert held_state_bytes(trainer.optimizers[0]) == held_state_bytes(ordinary.optimizers[0])


@pytest.mark.parametrize("device", ["state", "cpu"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}], ids=str)
def test_gradient_release_steps_on_the_host_too(device: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Scheduled()
    fit(plain, max_epochs=2, **options)
    if device == "cpu":
        fake_device(monkeypatch)
    module = Scheduled()
    fit(module, OptimizerOffload(device), GradientRelease(clip="two_pass", accumulate="host"), max_epochs=2, **options)
    assert module.losses == plain.losses
    assert equal(weights(module), weights(plain))


def test_the_audit_knows_that_gradients_were_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)
    fit(LitLM(), OptimizerOffload(gradients=True), MemoryAudit())
    text = Path("memsave/audit.json").read_text()
    assert "trainable tensors got a gradient" in text
    assert "got no gradient" not in text


# -- checkpoints of files ----------------------------------------------------------------------------------------------
def test_the_states_of_a_checkpoint_go_from_file_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(LitLM(), OptimizerOffload("state")).save_checkpoint(tmp_path / "a.ckpt")
    real, mapped = torch.load, []

    def load(*args: Any, **options: Any) -> Any:
        mapped.append(options.get("mmap"))
        return real(*args, **options)

    monkeypatch.setattr(torch, "load", load)
    fit(LitLM(), OptimizerOffload("state"), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert mapped == [True]


# -- ranks -------------------------------------------------------------------------------------------------------------
def _ddp(rank: int, options: dict[str, Any] | None) -> Any:
    module = LitLM()
    callbacks = [] if options is None else [OptimizerOffload(**options)]
    trainer = make_trainer(callbacks=callbacks, devices=2, strategy="ddp", max_epochs=2)
    trainer.fit(module, make_loader(batch_size=4))
    return module.losses, weights(module), len(list(Path("state").glob("*"))) if options else 0


def test_every_rank_of_ddp_has_files_of_its_own(ranks: Any) -> None:
    plain = ranks(_ddp, None)
    moved = ranks(_ddp, {"device": "state"})
    for one, other in zip(plain, moved):
        assert one[0] == other[0]
        assert equal(one[1], other[1])
        assert other[2] == 0


def _ddp_faked(rank: int, gradients: bool, strategy: str) -> Any:
    from lightning_memsave.optim import _offload_boundary

    _offload_boundary.boundary_of = lambda device: FakeBoundary()
    module, seen = LitLM(), Lines()
    trainer = make_trainer(
        callbacks=[OptimizerOffload(gradients=gradients), seen], devices=2, strategy=strategy, max_epochs=2
    )
    trainer.fit(module, make_loader(batch_size=4))
    return module.losses, weights(module), seen.lines


def test_ddp_steps_on_the_host_of_each_rank(ranks: Any) -> None:
    plain = ranks(_ddp, None)
    for one, other in zip(plain, ranks(_ddp_faked, False, "ddp")):
        assert one[0] == other[0]
        assert equal(one[1], other[1])


def test_gradients_leave_the_device_after_they_were_averaged_by_memsave_ddp(ranks: Any) -> None:
    plain = ranks(_ddp, None)
    for one, other in zip(plain, ranks(_ddp_faked, True, "memsave_ddp")):
        assert one[0] == other[0]
        assert equal(one[1], other[1])
        assert "inside of backward" in other[2][-1]


# -- between phases ----------------------------------------------------------------------------------------------------
# LitLM may build itself in configure_model, of which averaging warns
AVERAGING = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
NEEDS_AVERAGING = pytest.mark.skipif(
    Version(pl.__version__) < Version("2.6"), reason="Lightning averages weights from 2.6 on"
)


class Watch(pl.Callback):
    """Bytes of optimizer state and of averaged weights that are on the device, by phase."""

    def __init__(self) -> None:
        self.train: list[int] = []
        self.validation: list[int] = []

    def _bytes(self, trainer: Any) -> int:
        tensors = [v for o in trainer.optimizers for s in o.state.values() for v in s.values()]
        for callback in trainer.callbacks:
            model = getattr(callback, "_average_model", None)
            tensors += list(model.parameters()) if model is not None else []
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.train.append(self._bytes(trainer))

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.validation.append(self._bytes(trainer))


@AVERAGING
@pytest.mark.parametrize("average", [False, pytest.param(True, marks=NEEDS_AVERAGING)])
@pytest.mark.parametrize("order", [1, -1])
def test_state_and_averages_wait_on_the_host_while_a_validation_runs(average: bool, order: int, monkeypatch) -> None:
    def run(*extra: Any) -> Any:
        module, watch = LitLM(), Watch()
        averaging = [pl.callbacks.EMAWeightAveraging(decay=0.5)] if average else []
        callbacks = [*extra, *averaging][::order]
        trainer = fit(
            module, *callbacks, watch, val=make_loader(), max_epochs=2, num_sanity_val_steps=2, val_check_interval=2
        )
        return module, trainer, watch, trainer.callback_metrics["val_loss"]

    plain, ordinary, before, loss = run()
    boundary = fake_device(monkeypatch)
    module, trainer, watch, other_loss = run(OptimizerOffload(when="evaluation"))
    assert module.losses == plain.losses
    assert torch.equal(loss, other_loss)
    assert equal(weights(module), weights(plain))
    assert equal(state_of(trainer), state_of(ordinary))
    assert watch.train == before.train
    assert min(watch.train) > 0
    # the sanity check runs before there is any state; of the average, the copy that waits is away then too
    assert set(watch.validation) == {0}
    assert boundary.down == boundary.up
    assert boundary.buffers <= max(watch.train) + sum(b.nbytes for b in module.buffers()) + 64, "made once"


class Fails(LitLM):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        raise ZeroDivisionError


def test_an_exception_in_a_validation_leaves_everything_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)
    plain, module = LitLM(), Fails()
    ordinary = fit(plain)
    trainer = make_trainer(callbacks=[OptimizerOffload(when="evaluation")])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, make_loader(), make_loader())
    assert equal(state_of(trainer), state_of(ordinary))


@AVERAGING
@NEEDS_AVERAGING
def test_a_checkpoint_inside_of_a_validation_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_device(monkeypatch)

    class Saves(LitLM):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 1 and not self.trainer.sanity_checking:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    trainer = fit(Saves(), OptimizerOffload(when="evaluation"), pl.callbacks.EMAWeightAveraging(), val=make_loader())
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    assert equal(values(saved["optimizer_states"][0]), state_of(trainer))
    assert all(v.numel() for v in saved["current_model_state"].values())


def test_a_budget_below_the_state_is_refused_in_the_first_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)
    with pytest.raises(ConfigurationError, match=r"host_budget allows 1\.00 KiB"):
        fit(LitLM(), OptimizerOffload(when="evaluation", host_budget="1KiB"), val=make_loader())


# -- nothing to do, and misuse -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"gradients": True}])
def test_on_the_cpu_it_says_that_there_is_nothing_to_move(options: Any) -> None:
    seen, plain, module = Lines(), LitLM(), LitLM()
    fit(plain)
    fit(module, OptimizerOffload(**options), seen)
    assert "inactive: the module is on the CPU" in seen.lines[0]
    assert module.losses == plain.losses


def test_all_wrong_arguments_are_listed() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)device='cuda:0'.*gradients='yes'.*when='test'.*host_budget"):
        OptimizerOffload("cuda:0", gradients="yes", when="test", host_budget="much")
    with pytest.raises(ConfigurationError, match="leave device, gradients and master_weights out"):
        OptimizerOffload("state", when="evaluation")


def test_asking_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"asked for twice, OptimizerOffload\(device='state'\) and"):
        fit(LitLM(), OptimizerOffload("state"), OptimizerOffload())


class Clips(LitLM):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Zeroes(LitLM):
    def optimizer_zero_grad(self, *args: Any) -> None:
        self.zero_grad()


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (Gan, [], "needs automatic optimization with one optimizer"),
        (Clips, [], "Clips.configure_gradient_clipping works on gradients on the device"),
        (Zeroes, [], "Zeroes.optimizer_zero_grad works on gradients"),
        (LitLM, [GradientRelease()], "GradientRelease already frees each gradient"),
    ],
)
def test_what_needs_gradients_on_the_device_is_refused(module: Any, callbacks: Any, message: str, monkeypatch) -> None:
    fake_device(monkeypatch)
    with pytest.raises(ConfigurationError, match=message):
        fit(module(), OptimizerOffload(gradients=True), *callbacks)


def _ddp_gradients(rank: int) -> str:
    with pytest.raises(ConfigurationError) as error:
        _ddp_faked(rank, True, "ddp")
    return str(error.value)


def test_ddp_keeps_gradients_in_buckets_and_says_so(ranks: Any) -> None:
    assert all("Use strategy='memsave_ddp'" in text for text in ranks(_ddp_gradients))


def test_a_paged_optimizer_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)

    class Paged(LitLM):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.is_paged = True
            return optimizer

    with pytest.raises(ConfigurationError, match="AdamW pages its state"):
        fit(Paged(), OptimizerOffload())


@pytest.mark.parametrize("kind", ["fsdp1", "deepspeed"])
def test_strategies_that_step_themselves_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memsave.callbacks import _session

    monkeypatch.setattr(_session, "strategy_kind", lambda strategy: kind)
    with pytest.raises(IncompatibleMethodsError, match="OptimizerOffload does not run on"):
        fit(LitLM(), OptimizerOffload())


def test_under_fsdp2_only_the_evaluation_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memsave.callbacks import _session

    monkeypatch.setattr(_session, "strategy_kind", lambda strategy: "fsdp2")
    with pytest.raises(ConfigurationError, match=r"CPUOffloadPolicy\(\)\)\. Here, when='evaluation' works"):
        fit(LitLM(), OptimizerOffload())
    fake_device(monkeypatch)
    module, watch = LitLM(), Watch()
    fit(module, OptimizerOffload(when="evaluation"), watch, val=make_loader())
    assert set(watch.validation) == {0}
    assert len(module.losses) == 3


def test_too_little_room_stops_the_run_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)
    module = LitLM()
    with pytest.raises(ConfigurationError, match=r"host_budget allows 100.00 KiB. Raise it"):
        fit(module, OptimizerOffload(host_budget="100KiB"))
    monkeypatch.setattr(offload_module, "disk_free_bytes", lambda directory: 1000)
    with pytest.raises(ConfigurationError, match="of disk is needed"):
        fit(module, OptimizerOffload("state"))
    assert module.losses == []
    assert not Path("state").exists()


def test_the_callback_is_configuration(way: Any) -> None:
    callback = OptimizerOffload(**way)
    fit(LitLM(), callback)
    assert repr(copy.deepcopy(callback)) == repr(pickle.loads(pickle.dumps(callback))) == repr(callback)
