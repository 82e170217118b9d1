"""What all savers of one Trainer share, and how it goes away."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import lightning.pytorch
import pytest
import pytorch_lightning  # noqa: TID251  (both namespaces are under test)
import torch
from helpers import LitLM, make_loader, make_trainer
from packaging.version import Version
from torch import nn

from lightning_memsave import ActivationCheckpointing, Applied, ModelTransform, Stage, TiledCompute
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session, hook_instance
from lightning_memsave.errors import IncompatibleMethodsError
from lightning_memsave.planner import compatibility
from lightning_memsave.transforms.checkpoint_blocks import recompute_counts
from lightning_memsave.transforms.tiling import tile_counts


class Recorder(ModelTransform):
    """Count the parameters that exist when the pass runs, and mark the module until undone."""

    stage = Stage.KERNEL

    def __init__(self, tag: str = "a", persistent: bool = False) -> None:
        self.tag = tag
        self.persistent = persistent

    def apply(self, module: nn.Module) -> Applied:
        seen = module.__dict__.setdefault("seen", [])
        seen.append((self.tag, sum(p.numel() for p in module.parameters())))
        module.marked = True
        return Applied(
            summary="marked",
            num_modules=1,
            undo=lambda: module.__dict__.pop("marked", None),
            persistent=self.persistent,
        )


class Later(Recorder):
    stage = Stage.OFFLOAD


NUM_PARAMETERS = sum(p.numel() for p in LitLM().parameters())


@pytest.mark.parametrize("build_in", ["init", "setup", "configure_model"])
def test_the_pass_runs_once_when_the_model_exists(build_in: str) -> None:
    module = LitLM(build_in)
    trainer = make_trainer(callbacks=[Recorder()], limit_val_batches=1)
    trainer.fit(module, make_loader(), make_loader())
    assert module.seen == [("a", NUM_PARAMETERS)]


@pytest.mark.parametrize("reverse", [False, True])
def test_order_of_the_callbacks_does_not_matter(reverse: bool) -> None:
    callbacks = [Later("late"), Recorder("early")]
    module = LitLM()
    make_trainer(callbacks=callbacks[::-1] if reverse else callbacks).fit(module, make_loader())
    assert [tag for tag, _ in module.seen] == ["early", "late"]


def test_nothing_is_left_after_fit_and_each_entry_point_runs_the_pass() -> None:
    module, trainer = LitLM(), make_trainer(callbacks=[Recorder()])
    keys = set(module.__dict__)
    for call in (trainer.fit, trainer.validate, trainer.test, trainer.predict, trainer.fit):
        call(module, make_loader())
        assert not hasattr(module, "marked")
        assert set(module.__dict__) - keys <= {"seen", "_memsave_applied", "_hparams"}  # Lightning makes hparams
        assert Session.find(trainer) is None
        assert not set(trainer.strategy.__dict__) & {"training_step", "backward"}
    assert len(module.seen) == 5
    copy.deepcopy(module)
    pickle.dumps(module.net)


def test_what_persists_is_applied_once_over_several_runs() -> None:
    module, trainer = LitLM(), make_trainer(callbacks=[Recorder(persistent=True)])
    trainer.fit(module, make_loader())
    trainer.validate(module, make_loader())
    make_trainer(callbacks=[Recorder(persistent=True)]).fit(module, make_loader())
    assert len(module.seen) == 1
    assert module.marked


@pytest.mark.parametrize("where", ["training_step", "setup", "configure_optimizers", "on_fit_start"])
def test_an_exception_anywhere_leaves_the_module_as_it_was(where: str) -> None:
    class Failing(LitLM):
        pass

    def fail(self: LitLM, *args: object, **kwargs: object) -> None:
        raise RuntimeError("mine")

    setattr(Failing, where, fail)
    module, trainer = Failing(), make_trainer(callbacks=[Recorder()])
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(module, make_loader())
    assert "configure_model" not in module.__dict__
    assert not hasattr(module, "marked")
    assert Session.find(trainer) is None


def test_two_that_cannot_be_together_are_refused_before_the_model_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compatibility.METHOD_PAIRS, frozenset({"Recorder", "Later"}), "they quarrel. Keep one.")
    monkeypatch.setitem(compatibility.METHOD_STRATEGIES, ("Later", "single"), "needs two devices.")
    module = LitLM("configure_model")
    with pytest.raises(IncompatibleMethodsError) as caught:
        make_trainer(callbacks=[Recorder(), Later()]).fit(module, make_loader())
    assert str(caught.value).splitlines() == [
        "Later and Recorder do not combine: they quarrel. Keep one.",
        "Later does not run on the 'single' strategy: needs two devices.",
    ]
    assert not hasattr(module, "net")


class Contexts(Saver):
    def __init__(self) -> None:
        self.name = "contexts"

    def setup(self, trainer, pl_module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        seen = pl_module.__dict__.setdefault("phases", [])
        depth = pl_module.__dict__.setdefault("depth", [0])

        @contextmanager
        def enter(phase: str):
            seen.append(phase)
            depth[0] += 1
            try:
                yield
            finally:
                depth[0] -= 1

        Session.of(trainer).add_context("contexts", enter)


class InContext(LitLM):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.manual = manual

    def training_step(self, batch, batch_idx: int):
        assert self.depth == [1]
        loss = self.loss(batch)
        loss.register_hook(lambda grad: (self.__dict__.setdefault("in_backward", []).append(self.depth[0]), grad)[1])
        if self.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


@pytest.mark.parametrize("manual", [False, True])
def test_contexts_cover_steps_and_backward_and_survive_exceptions(manual: bool) -> None:
    module = InContext(manual)
    trainer = make_trainer(callbacks=[Contexts()], limit_train_batches=1, limit_val_batches=1)
    trainer.fit(module, make_loader(), make_loader())
    assert module.phases == ["training_step", "backward", "validation_step"]
    assert module.depth == [0]
    # manual optimization calls backward inside the training step, so the context is entered twice
    assert module.in_backward == [2 if manual else 1]
    trainer.test(module, make_loader(), verbose=False)
    trainer.predict(module, make_loader())
    assert module.phases[3:] == ["test_step"] * 3 + ["predict_step"] * 3


class SwapToSGD(Saver):
    def setup(self, trainer, pl_module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        Session.of(trainer).on_optimizers(pl_module, lambda config: torch.optim.SGD(config.param_groups, lr=0.5))


def test_the_optimizer_hook_sees_what_the_module_returned_once() -> None:
    module, trainer = LitLM(), make_trainer(callbacks=[SwapToSGD()])
    trainer.fit(module, make_loader())
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert "configure_optimizers" not in module.__dict__


@pytest.mark.parametrize("namespace", [lightning.pytorch, pytorch_lightning], ids=lambda n: n.__name__)
def test_a_trainer_of_either_namespace_takes_the_callbacks(namespace) -> None:
    class Lit(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Lit()
    trainer = make_trainer(namespace, callbacks=[copy.deepcopy(Recorder()), pickle.loads(pickle.dumps(Later("z")))])
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 2)))
    assert [tag for tag, _ in module.seen] == ["a", "z"]


def test_a_callback_shows_the_call_that_makes_it() -> None:
    assert repr(Recorder()) == "Recorder()"
    assert repr(Recorder("b", persistent=True)) == "Recorder(tag='b', persistent=True)"


def test_an_instance_hook_goes_away_whatever_was_there() -> None:
    class Thing:
        def value(self) -> int:
            return 1

    thing = Thing()
    undo = hook_instance(thing, "value", lambda inner: inner() + 1)
    outer = hook_instance(thing, "value", lambda inner: inner() * 10)
    assert thing.value() == 20
    outer()
    assert thing.value() == 2
    undo()
    undo()
    assert thing.value() == 1
    assert "value" not in thing.__dict__


def _two_ranks(rank: int, strategy: str) -> list:
    module = LitLM("configure_model")
    make_trainer(callbacks=[Recorder()], devices=2, strategy=strategy).fit(module, make_loader())
    return [module.seen, module.losses]


def test_the_pass_runs_on_each_rank_of_ddp(ranks) -> None:
    results = ranks(_two_ranks, "ddp")
    assert [seen for seen, _ in results] == [[("a", NUM_PARAMETERS)]] * 2


@pytest.mark.skipif(Version(lightning.pytorch.__version__) < Version("2.6"), reason="no WeightAveraging before 2.6")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_callback_that_calls_configure_model_early_hides_no_saver_behind_it():
    from lightning.pytorch.callbacks import WeightAveraging

    class Looks(lightning.pytorch.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((len(recompute_counts(pl_module)), len(tile_counts(pl_module))))

    seen: list[tuple[int, int]] = []
    tiled = TiledCompute(["*norm*"], tile_tokens=4)
    make_trainer(callbacks=[ActivationCheckpointing(), WeightAveraging(), tiled, Looks()]).fit(LitLM(), make_loader())
    assert seen == [(2, 5)]
